"""Known answers and properties of the streaming metrics (pitfalls 15 and 19)."""

import json
import math

import pytest
import torch

from xlc_ray.config import UserError
from xlc_ray.config.dictionary import Dictionary
from xlc_ray.dictionary import Shards, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.evaluation import evaluate_reconstruction
from xlc_ray.evaluation.metrics import DENSITY_EDGES, Activity, Moments, ReconstructionMetrics


def moments(x, x_hat, batches=1):
    found = Moments.empty(x.shape[1])
    for here, there in zip(x.chunk(batches), x_hat.chunk(batches), strict=True):
        found.update(here, there)
    return found


def test_hand_computed_quotients():
    x, x_hat = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    found = moments(x, x_hat).compute()
    # mean (2, 0), so Σ‖x - x̄‖² = 2; Σ‖r‖² = 1
    assert found == {
        "explained_variance": 0.5,
        "fvu": 0.5,
        "cosine_similarity": 1.0,
        "l2_ratio": pytest.approx((1 + 2 / 3) / 2),
        "relative_reconstruction_bias": pytest.approx((1 + 4) / (1 + 6)),
    }


def test_identity_explains_all_the_mean_nothing_and_zero_less_than_nothing():
    x = torch.randn(500, 7) * 3 + 5
    assert moments(x, x).compute()["explained_variance"] == 1
    mean = x.double().mean(0).expand_as(x)
    assert moments(x, mean).compute()["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert moments(x, torch.zeros_like(x)).compute()["explained_variance"] < -1


@pytest.mark.parametrize("seed", range(20))
def test_explained_variance_never_exceeds_one(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator) * 10.0 ** torch.randint(-3, 4, (1, 3), generator=generator)
    x_hat = x + torch.randn(40, 3, generator=generator) * 10.0 ** (seed % 7 - 6)
    found = moments(x, x_hat).compute()
    assert found["explained_variance"] <= 1
    assert found["explained_variance"] + found["fvu"] == pytest.approx(1)


def test_matches_the_two_pass_formula_where_the_mean_dwarfs_the_spread():
    x = (torch.randn(4000, 5, dtype=torch.float64) + 1e4).float()
    x_hat = x + 0.3 * torch.randn(4000, 5)
    exact = x.double()
    direct = 1 - (exact - x_hat.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert moments(x, x_hat, batches=9).compute()["explained_variance"] == pytest.approx(float(direct), abs=1e-7)


def test_quotients_without_a_denominator_have_no_value():
    constant = torch.full((10, 3), 0.1)
    assert moments(constant, constant * 2).compute()["explained_variance"] is None
    zero = moments(torch.zeros(4, 2), torch.zeros(4, 2)).compute()
    assert zero == dict.fromkeys(zero, None) | {"cosine_similarity": 0.0}


def test_a_zero_row_does_not_poison_the_others():
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = moments(x, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).compute()
    assert found["l2_ratio"] == 0.5
    assert found["cosine_similarity"] == 0.5


def test_activity_counts_l0_dead_features_and_density():
    activity = Activity.empty(4)
    activity.update(torch.tensor([0, 1, 4, 5]), tokens=5)
    activity.update(torch.tensor([0, 0, 5, 5]), tokens=5)
    assert activity.compute() == {"features": 4, "l0": 2.0, "dead_features": 0.25}
    density = dict(zip(DENSITY_EDGES[:-1].round(2), activity.density(), strict=True))
    assert {edge: n for edge, n in density.items() if n} == {-10.0: 1, -1.0: 1, -0.25: 2}  # 0, 0.1, 0.9 and 1


def stream(seed=0, rows=60):
    generator = torch.Generator().manual_seed(seed)
    raw = {"a": torch.randn(rows, 3, generator=generator), "b": torch.randn(rows, 2, generator=generator) * 100}
    raw_hat = {site: x + torch.randn(x.shape, generator=generator) * 0.3 * x.std() for site, x in raw.items()}
    y, y_hat = (torch.cat([rows["a"], rows["b"] / 100], 1) for rows in (raw, raw_hat))
    active = torch.rand(2, rows, 8, generator=generator) < torch.linspace(0, 0.3, 8)
    return raw, raw_hat, y, y_hat, active


def measured(parts):
    found = ReconstructionMetrics.empty({"a": 3, "b": 2}, [8, 8])
    raw, raw_hat, y, y_hat, active = stream()
    for part in parts:
        here, there = ({s: v[part] for s, v in rows.items()} for rows in (raw, raw_hat))
        found.update(here, there, y[part], y_hat[part], [a[part].sum(0) for a in active])
    return found


def test_merged_is_the_whole_whatever_the_split():
    whole = measured([slice(None)]).compute()
    merged = measured([slice(0, 7)])
    merged.merge(measured([slice(7, 8), slice(8, 41)]))
    merged.merge(measured([slice(41, None)]))
    flat, other = (json.dumps(tree, default=float) for tree in (whole, merged.compute()))
    assert merged.tokens == 60
    assert _numbers(json.loads(flat)) == pytest.approx(_numbers(json.loads(other)), rel=1e-12)


def _numbers(tree):
    if isinstance(tree, dict):
        return [n for key in sorted(tree) for n in _numbers(tree[key])]
    if isinstance(tree, list):
        return [n for item in tree for n in _numbers(item)]
    return [tree]


def test_the_total_weighs_sites_in_normalised_units():
    raw, raw_hat, y, y_hat, _ = stream()
    found = measured([slice(None)]).compute()
    normalised = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(float(normalised), abs=1e-5)
    raw_x, raw_x_hat = torch.cat(list(raw.values()), 1), torch.cat(list(raw_hat.values()), 1)
    unscaled = 1 - (raw_x - raw_x_hat).square().sum() / (raw_x - raw_x.mean(0)).square().sum()
    assert abs(found["explained_variance"] - float(unscaled)) > 1e-3
    assert found["fvu"] == pytest.approx(1 - found["explained_variance"])
    assert found["l0"] == pytest.approx(sum(group["l0"] for group in found["groups"]))


def dictionary(gate, features=16, **settings):
    config = Dictionary(wiring={"kind": "sae"}, features=features, gate=gate, **settings)
    return build(config, wiring.sae(["resid_post.0", "resid_post.1"], 4), 0, Shards())


def batches(count=3, rows=32):
    generator = torch.Generator().manual_seed(1)
    return [{f"resid_post.{n}": torch.randn(rows, 4, generator=generator) for n in (0, 1)} for _ in range(count)]


def test_reconstruction_is_measured_in_inference_form():
    """A BatchTopK dictionary trains with k·B features a batch; at inference its threshold decides, token by token."""
    found = dictionary({"kind": "batchtopk", "k": 2})
    found.train()
    with torch.no_grad():
        metrics = evaluate_reconstruction(found, batches()).compute()
        single = [{s: v[i : i + 1] for s, v in b.items()} for b in batches() for i in range(32)]
        one_by_one = evaluate_reconstruction(found, single).compute()
        assert found.training
        found.eval()
        l0 = torch.cat([sum(f.l0() for f in found.encode(found.normalize_inputs(b))) for b in batches()])
    assert metrics["l0"] == pytest.approx(float(l0.double().mean()))
    assert metrics["l0"] == pytest.approx(one_by_one["l0"])
    assert metrics["tokens"] == one_by_one["tokens"] == 96


def test_reconstruction_agrees_with_reconstruct():
    found = dictionary({"kind": "relu"}).eval()
    metrics = evaluate_reconstruction(found, batches()).compute()
    with torch.no_grad():
        whole = {s: torch.cat([b[s] for b in batches()]) for s in ("resid_post.0", "resid_post.1")}
        for site, x_hat in found.reconstruct(whole).items():
            direct = moments(whole[site], x_hat).compute()["explained_variance"]
            assert metrics["sites"][site]["explained_variance"] == pytest.approx(direct, abs=1e-6)
    assert metrics["groups"][0]["features"] == 16


def test_no_rows_and_no_finite_reconstruction_are_errors_of_one_line():
    with pytest.raises(UserError, match=r"hold no rows; set generate\.held_out_tokens"):
        evaluate_reconstruction(dictionary({"kind": "relu"}), []).compute()
    broken = dictionary({"kind": "relu"})
    with torch.no_grad():
        broken.b_dec[5] = math.nan
    with pytest.raises(UserError, match=r"resid_post\.1: the reconstruction is not finite"):
        evaluate_reconstruction(broken, batches()).compute()
