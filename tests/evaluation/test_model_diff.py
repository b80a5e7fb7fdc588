"""Metrics of model diffing against their definitions in float64, and planted cases with known answers."""

import json

import pytest
import torch

from tests.dictionary import make
from tests.tuned import save_tuned
from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair
from xlc_ray.config import Model
from xlc_ray.dictionary import wiring
from xlc_ray.evaluation import evaluate_reconstruction
from xlc_ray.evaluation.model_diff import ModelDiff, compared
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.replacement import evaluate_replacement, prepare

from .conftest import TINY
from .test_replacement import hooked_logits, put, scores

DIFF = wiring.model_diff("resid_post.2", 5, 5)


def measured(dictionary, batches):
    diff = ModelDiff.of(dictionary)
    evaluate_reconstruction(dictionary, batches, diff=diff)
    return diff


def random_batches(rows=40, wires=DIFF):
    whole = make.activations(wires, rows)
    return [{site: values[part] for site, values in whole.items()} for part in (slice(0, 13), slice(13, rows))]


def reference(dictionary, batches):
    """By the definitions, a feature at a time: the least-squares multiple of f d against each target."""
    batch = {site: torch.cat([b[site] for b in batches]) for site in batches[0]}
    x, y = dictionary.normalize_inputs(batch), dictionary.normalize_targets(batch)
    f = dictionary.encode(x)[0].dense()
    y_hat = dictionary.decode(dictionary.encode(x), x)
    mine, base = dictionary.groups[0].W_dec.detach().split(5, dim=1)
    found = []
    for i in range(f.shape[1]):
        d, d_base, act = mine[i], base[i], f[:, i : i + 1]

        def beta(target, d=d, act=act):
            return torch.linalg.lstsq((act * d).reshape(-1, 1), target.reshape(-1, 1)).solution.item()

        own, other = y_hat.split(5, dim=1)
        own_error, other_error = (y - y_hat).split(5, dim=1)
        a, b = d.norm(), d_base.norm()
        found.append(
            {
                "frequency": float((act > 0).double().mean()),
                "relative_norm": float(a / (a + b)),
                "delta": float(((a - b) / max(a, b) + 1) / 2),
                "cosine": float(d @ d_base / (a * b)),
                "nu_reconstruction": beta(other) / beta(own),
                "nu_error": beta(other_error + act * d_base) / beta(own_error + act * d),
            }
        )
    return found


@pytest.mark.parametrize("gate", [{"kind": "relu"}, {"kind": "topk", "k": 3}])
@pytest.mark.parametrize("products", ["dense", "sparse"])
@torch.no_grad()
def test_equals_the_definitions(gate, products):
    dictionary = make.dictionary(DIFF, gate, products=products).eval()
    dictionary.write_scale[5:] = 3.0  # each model in units of its own
    batches = random_batches()
    found = measured(dictionary, batches).per_feature()
    expected = reference(dictionary, batches)
    for i, values in enumerate(expected):
        if values["frequency"]:
            for name, value in values.items():
                assert float(found[name][i]) == pytest.approx(value, rel=1e-9, abs=1e-9), (i, name)
    assert any(values["frequency"] for values in expected)


@torch.no_grad()
def test_parts_merge_to_the_whole():
    dictionary = make.dictionary(DIFF).eval()
    batches = random_batches()
    whole, first, second = (
        measured(dictionary, batches),
        measured(dictionary, batches[:1]),
        measured(dictionary, batches[1:]),
    )
    first.merge(second)
    assert first.tokens == whole.tokens == 40
    for name, values in whole.per_feature().items():
        torch.testing.assert_close(first.per_feature()[name], values, equal_nan=True)


def planted(base_rows, columns=4):
    """Feature i is active with max(x_i, 0) and writes x_i to the model's dimension i; `base_rows` to the base."""
    wires = wiring.model_diff("resid_post.0", columns, columns)
    dictionary = make.dictionary(wires, features=columns).eval()
    with torch.no_grad():
        for p in dictionary.parameters():
            p.zero_()
        dictionary.groups[0].W_enc[:, :columns] = torch.eye(columns)
        dictionary.groups[0].W_dec[:, :columns] = torch.eye(columns)
        dictionary.groups[0].W_dec[:, columns:] = torch.tensor(base_rows).double()
    return dictionary


def test_planted_features_are_told_apart():
    """Feature 0: shared. 1: in the base's error, though its row had shrunk. 2: only the model's. 3: only the base's."""
    rows = [[1.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 30]]
    dictionary = planted(rows)
    x = make.random(500, 4).clamp(min=0)
    base = torch.stack([x[:, 0], 0.8 * x[:, 1], torch.zeros(500).double(), 30 * x[:, 3]], dim=1)
    diff = measured(dictionary, [{"resid_post.0": x, "resid_post.0@base": base}])
    found = diff.per_feature()
    assert found["relative_norm"].tolist() == pytest.approx([0.5, 1.0, 1.0, 1 / 31])
    assert found["delta"].tolist() == pytest.approx([0.5, 1.0, 1.0, (1 / 30) / 2])
    assert found["cosine"][0] == 1
    assert found["nu_error"][:3].tolist() == pytest.approx([1.0, 0.8, 0.0], abs=1e-12)
    assert found["nu_reconstruction"][:3].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)
    plain = diff.compute()
    assert plain["classes"] == {"model_only": 2, "base_only": 1, "shared": 1, "between": 0}
    assert (plain["latent_scaling"]["features"], plain["latent_scaling"]["genuine"]) == (2, 1)
    assert {row["feature"] for row in plain["model_only"]} == {1, 2}
    assert sum(plain["relative_norm"]["counts"]) == plain["alive"] == 4
    assert plain["cosine_of_shared"]["median"] == 1
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_concept_that_the_base_writes_by_another_feature_is_not_genuine():
    """Two features that fire together: one writes the direction to the model, the other the same to the base."""
    dictionary = planted([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0] * 4, [0.0] * 4])
    x = make.random(400, 4).clamp(min=0)
    x[:, 1] = x[:, 0]
    base = torch.zeros_like(x)
    base[:, 0] = x[:, 0]
    found = measured(dictionary, [{"resid_post.0": x, "resid_post.0@base": base}]).per_feature()
    assert found["nu_error"][0].item() == pytest.approx(0, abs=1e-12)  # the reconstruction leaves no error
    assert found["nu_reconstruction"][0].item() == pytest.approx(1)


def test_silent_features_have_no_scaling_and_do_not_count():
    dictionary = planted([[1.0, 0, 0, 0]] + [[0.0] * 4] * 3)
    x = torch.zeros(10, 4).double()
    x[:, 0] = torch.arange(10)
    diff = measured(dictionary, [{"resid_post.0": x, "resid_post.0@base": x}])
    assert diff.per_feature()["nu_error"][1:].isnan().all()
    assert (diff.compute()["alive"], diff.compute()["classes"]["model_only"]) == (1, 0)
    assert diff.compute()["latent_scaling"]["median_nu_error"] is None


def test_models_of_different_widths_have_norms_but_no_cosine():
    wires = wiring.model_diff("resid_post.0", 4, 6)
    found = measured(make.dictionary(wires).eval(), [make.activations(wires, 20)])
    assert found.per_feature()["cosine"].isnan().all()
    assert found.compute()["latent_scaling"] is None
    assert 0 < found.compute()["relative_norm"]["mean"] < 1


def test_only_a_pair_of_one_site_is_compared():
    assert compared(DIFF) == (0, "resid_post.2")
    both = ("a", "a@base")
    assert compared(wiring.Wiring(dict.fromkeys(both, 2), (both,), (tuple(reversed(both)),))) == (0, "a")
    for other in (wiring.sae(["a"], 2), wiring.sae(both, 2), wiring.crosscoder(["a", "b"], 2, "acausal")):
        assert compared(other) is None


# ------------------------------------------------------------ replacement


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """The tiny model as the base, and a moved copy; the base reads 11 for 10."""
    tuned = LanguageModel(Model(name=save_tuned(TINY, tmp_path_factory.mktemp("tuned"))))
    return ModelPair(tuned, model, {10: 11})


@pytest.fixture(scope="module")
def replaced_windows(windows):
    tokens, length, keep = windows
    tokens = tokens.clone()
    tokens[0, 4], tokens[3, 9] = 10, 10
    return tokens, length, keep


def test_each_model_is_spliced_and_scored_on_its_own_tokens(pair, replaced_windows):
    sites = ("resid_post.2", "resid_post.2@base")
    dictionary = make.dictionary(wiring.model_diff("resid_post.2", 64, 64), features=48).float().eval()
    found = evaluate_pair(dictionary, pair, [prepare(*(part[:4] for part in replaced_windows)),
                                             prepare(*(part[4:] for part in replaced_windows))]).compute()  # fmt: skip
    tokens, length, keep = replaced_windows
    read = {sites[0]: tokens, sites[1]: tokens.where(tokens != 10, 11)}
    rows = {site: pair.of(site).harvest(read[site], length, ["resid_post.2"])["resid_post.2"][keep] for site in sites}
    with torch.no_grad():
        rebuilt = dictionary.reconstruct(rows)
    total = 0.0
    for site, name in zip(sites, ("model", "base_model"), strict=True):
        lm, own = pair.of(site), (read[site], length, keep)
        original = hooked_logits(lm, own, {})
        spliced = hooked_logits(lm, own, {"resid_post.2": lambda v, new=rebuilt[site]: put(v, keep, new)})
        zeroed = hooked_logits(lm, own, {"resid_post.2": lambda v: put(v, keep, torch.zeros(1))})
        ce, kl, same = scores(spliced, original, own)
        clean, gone = scores(original, original, own)[0], scores(zeroed, original, own)[0]
        expected = {"ce_original": clean, "ce_replaced": ce, "ce_ablated": gone, "kl": kl, "top1_agreement": same,
                    "ce_recovered": (gone - ce) / (gone - clean)}  # fmt: skip
        for key, value in expected.items():
            assert found["sites"][site][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (site, key)
            assert found["models"][name][key] == found["sites"][site][key]
        total += ce
    assert found["all"]["ce_replaced"] == pytest.approx(total / 2, rel=1e-4)
    assert found["tokens"] == 2 * int(prepare(*replaced_windows).scored.sum())
    assert found["windows"] == 6
    assert found["models"]["model"]["ce_original"] != pytest.approx(found["models"]["base_model"]["ce_original"])


def test_a_perfect_dictionary_changes_neither_model(pair, windows):
    wires = wiring.model_diff("resid_post.1", 64, 64)
    dictionary = make.dictionary(wires, features=256).float().eval()
    both = torch.cat([torch.eye(128), -torch.eye(128)])
    with torch.no_grad():
        for p in dictionary.parameters():
            p.zero_()
        dictionary.groups[0].W_enc.copy_(both)
        dictionary.groups[0].W_dec.copy_(both)
    found = evaluate_pair(dictionary, pair, [prepare(*windows)]).compute()
    for one in (found["all"], *found["sites"].values()):
        assert one["kl"] == pytest.approx(0, abs=1e-5)
        assert one["ce_recovered"] == pytest.approx(1, abs=1e-4)
        assert one["top1_agreement"] == 1


def test_a_dictionary_of_the_base_alone_scores_as_it_does_on_the_base(pair, model, windows):
    based, plain = (make.dictionary(wiring.sae([site], 64), features=32).float().eval()
                    for site in ("resid_post.1@base", "resid_post.1"))  # fmt: skip
    found = evaluate_pair(based, ModelPair(pair.model, model, {}), [prepare(*windows)]).compute()
    expected = evaluate_replacement(plain, model, [prepare(*windows)]).compute()
    assert list(found["models"]) == ["base_model"]
    for key, value in expected["all"].items():
        assert found["all"][key] == pytest.approx(value, rel=1e-4, abs=1e-6)
