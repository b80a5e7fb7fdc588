"""End-to-end training against a splice written by hand, and what must hold of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf

from tests.training import texts
from tests.training.test_loop import Interrupted, final_state, interrupt_at
from xlc_ray.activations import store
from xlc_ray.activations.passages import PassageStream
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards, checkpoint
from xlc_ray.dictionary.build import build, normalize_by
from xlc_ray.evaluation import evaluate
from xlc_ray.training import Learner, train_alone
from xlc_ray.training.end_to_end import EndToEnd, divergence, later
from xlc_ray.training.loop import wiring_for

LAYERS = 4
DOUBLE = {"train.precision": "float64", "train.clip_norm": None, "train.loss": {}}
SAE = {"kind": "sae", "layers": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    texts.make_store(folder)
    return folder


def make(folder, changes):
    """(Learner, EndToEnd) of settings: random biases, so that no gradient is 0 by symmetry."""
    config = texts.settings(folder, changes)
    data = store.open_store(config.source.path)
    wiring = wiring_for(config, data)
    dictionary = build(config.dictionary, wiring, config.seed, Shards())
    normalize_by(dictionary, config.dictionary.normalization, config.dictionary.wiring.kind, data.statistics())
    learner = Learner(dictionary, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters.values():
            p += 0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return learner, EndToEnd(dictionary, config, data)


class Hooked:
    """The model by forward hooks alone: `run(tokens, attention, {site: new kept rows})` → logits and all sites."""

    def __init__(self, hf, keep):
        self.hf, self.keep = hf, keep

    def place(self, site):
        kind, layer = site.split(".")
        block = self.hf.transformer.h[int(layer)]
        return block.mlp if kind.startswith("mlp") else block

    def run(self, tokens, attention, rows):
        seen, handles = {}, []

        def before(site):
            def hook(_, args):
                seen[site] = args[0]
                if site in rows:
                    return (self.put(args[0], rows[site]), *args[1:])
                return None

            return hook

        def after(site):
            def hook(_, args, out):
                value = out[0] if isinstance(out, tuple) else out
                if site in rows:
                    value = self.put(value, rows[site])
                seen[site] = value
                return (value, *out[1:]) if isinstance(out, tuple) else value

            return hook

        for layer in range(LAYERS):
            for kind in ("resid_pre", "mlp_in"):
                handles.append(self.place(f"{kind}.{layer}").register_forward_pre_hook(before(f"{kind}.{layer}")))
            for kind in ("mlp_out", "resid_post"):
                handles.append(self.place(f"{kind}.{layer}").register_forward_hook(after(f"{kind}.{layer}")))
        logits = self.hf(input_ids=tokens, attention_mask=attention, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return logits[self.keep], {site: value[self.keep] for site, value in seen.items()}

    def put(self, value, rows):
        mask = self.keep[..., None].to(value.dtype)
        wide = torch.zeros_like(value).masked_scatter(self.keep[..., None], rows)
        return value * (1 - mask) + wide


def by_hand(learner, frozen, passages, scales):
    """{name: term} with gradient: encoder and decoder written out, one splice a written site."""
    d, wiring = learner.dictionary, learner.dictionary.wiring
    model = Hooked(frozen.model.hf, passages.keep)
    p_logits, clean = model.run(passages.tokens, passages.attention, {})
    log_p, b = p_logits.log_softmax(1), int(passages.keep.sum())
    terms = {"kl": 0.0, "downstream": 0.0, "reconstruction": 0.0}
    first_r = first_w = 0
    for g, (read, write) in enumerate(zip(wiring.reads, wiring.writes, strict=True)):
        r, w = slice(first_r, first_r + 64), slice(first_w, first_w + 64)
        first_r, first_w = first_r + 64, first_w + 64
        x = (clean[read[0]] - d.read_mean[r]) / d.read_scale[r]
        y = (clean[write[0]] - d.write_mean[w]) / d.write_scale[w]
        group = d.groups[g]
        y_hat = torch.relu(x @ group.W_enc.T + group.b_enc) @ group.W_dec + d.b_dec[w]
        if wiring.skip:
            y_hat = y_hat + x @ d.W_skip[g].T
        raw = y_hat * d.write_scale[w] + d.write_mean[w]
        q_logits, changed = model.run(passages.tokens, passages.attention, {write[0]: raw})
        terms["kl"] += nnf.kl_div(q_logits.log_softmax(1), log_p, log_target=True, reduction="sum") / b
        layer = int(write[0].split(".")[1])
        after = [f"resid_post.{n}" for n in range(layer + 1, LAYERS)]
        for t in after:
            terms["downstream"] += ((changed[t] - clean[t]) / scales[t]).square().sum() / b / len(after)
        terms["reconstruction"] += (y - y_hat).square().sum() / b
    return terms


@pytest.mark.parametrize(
    "wiring",
    [
        SAE,
        {"kind": "sae", "layers": [1, 2]},
        {"kind": "transcoder", "layers": [1, 2]},
        {"kind": "transcoder", "layers": [2], "skip": True},
    ],
    ids=["sae", "saes", "transcoders", "skip"],
)
def test_terms_and_gradients_equal_a_splice_by_hooks(folder, wiring):
    weights = {"kl": 0.7, "downstream": 0.2, "reconstruction": 0.05}
    learner, frozen = make(folder, DOUBLE | {"dictionary.wiring": wiring, "train.end_to_end": weights})
    passages = frozen.stream.read(0, 60)
    want = by_hand(learner, frozen, passages, frozen.scales)
    names = list(learner.parameters)
    loss = sum(weights[k] * v for k, v in want.items())
    grads = torch.autograd.grad(loss, [learner.parameters[n] for n in names])
    metrics = learner.train_on(frozen.batch(0), 60, measure=True)
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-9), name
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for name, grad in zip(names, grads, strict=True):
        assert grad.abs().max() > 1e-6, name
        torch.testing.assert_close(learner.parameters[name].grad, grad, rtol=1e-9, atol=1e-11, msg=name)
    assert all(p.grad is None for p in frozen.model.hf.parameters())


def test_scales_are_those_of_the_text(folder):
    """s_t² = E‖a_t‖² / d over calibration_tokens rows of the stream, in pieces as in one."""
    changes = DOUBLE | {"train.end_to_end": {"downstream": 1.0}, "train.calibration_tokens": 200}
    _, frozen = make(folder, changes)
    passages = frozen.stream.read(0, 200)
    model = Hooked(frozen.model.hf, passages.keep)
    _, clean = model.run(passages.tokens, passages.attention, {})
    assert list(frozen.scales) == ["resid_post.2", "resid_post.3"]
    for site, scale in frozen.scales.items():
        assert scale == pytest.approx(float((clean[site].square().sum() / 200 / 64).sqrt()), rel=1e-12)


@pytest.mark.parametrize("wiring", [SAE, {"kind": "sae", "site": "mlp_out", "layers": [1, 2]}])
def test_a_perfect_dictionary_costs_nothing(folder, wiring):
    """f = ReLU(±x) decoded by ± unit rows: no term, and no gradient of one, is more than rounding."""
    changes = DOUBLE | {"dictionary.wiring": wiring, "dictionary.features": 128}
    learner, frozen = make(folder, changes | {"train.end_to_end": {"downstream": 1.0, "reconstruction": 1.0}})
    both = torch.cat([torch.eye(64), -torch.eye(64)]).double()
    with torch.no_grad():
        learner.dictionary.b_dec.zero_()
        for group in learner.dictionary.groups:
            group.W_enc.copy_(both)
            group.W_dec.copy_(both)
            group.b_enc.zero_()
    metrics = learner.train_on(frozen.batch(0), 60, measure=True)
    for name in ("kl", "downstream", "reconstruction", "grad_norm"):
        assert abs(metrics[name]) < 1e-9, name


def test_micro_batches_are_one_batch(folder):
    changes = DOUBLE | {"train.end_to_end": {"downstream": 0.3}}
    (once, whole), (often, cut) = (make(folder, changes | {"train.accumulate": n}) for n in (1, 4))
    for step in range(2):
        one = once.train_on(whole.batch(step), 60, measure=True)
        two = often.train_on(cut.batch(step), 60, measure=True)
        # A window across a cut is spliced part by part: not the same function, yet the same tokens.
        assert two["reconstruction"] == pytest.approx(one["reconstruction"], rel=1e-2)
        assert two["kl"] == pytest.approx(one["kl"], rel=0.2)
    assert [int(m["resid_post.1"].shape[0]) for m, _ in cut.batch(5)] == [15] * 4
    rows = torch.cat([m["resid_post.1"] for m, _ in cut.batch(5)])
    torch.testing.assert_close(rows, next(iter(whole.batch(5)))[0]["resid_post.1"], rtol=1e-12, atol=1e-12)


def test_rows_of_the_original_run_are_those_of_the_store(folder):
    """So normalisation by the store's statistics fits, and the mask is the store's."""
    _, frozen = make(folder, {})
    data = store.open_store(f"{folder}/store")
    stored = [torch.from_numpy(data.read(c, 0, n, ["resid_post.1"])["resid_post.1"])
              for c, n in enumerate(data.chunk_rows)]  # fmt: skip
    stored = torch.cat(stored)
    (rows, _) = next(iter(frozen.batch(0)))
    distance, where = torch.cdist(rows["resid_post.1"].double(), stored.double()).min(dim=1)
    assert distance.max() < 1e-4
    assert len(set(where.tolist())) == 60


def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(folder, tmp_path):
    gate = {"kind": "batchtopk", "k": 3, "threshold_start": 3}
    changes = {"dictionary.gate": gate, "train.loss": {"auxk": {}}, "train.end_to_end": {"downstream": 0.1}}
    whole, broken = (texts.settings(folder, changes | {"out": f"{tmp_path}/{name}"}) for name in ("whole", "broken"))
    train_alone(whole)
    for stop in (6, 11):
        with pytest.raises(Interrupted):
            train_alone(broken.override({"train.log_every": 1}), interrupt_at(stop))
    train_alone(broken)
    want, got = final_state(whole), final_state(broken)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name
    lines = [json.loads(line) for line in Path(whole.out, "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [60, 240, 480, 720]
    assert all(line["kl"] > 0 and line["downstream"] > 0 for line in lines)


def test_training_reads_no_held_out_text(folder):
    train, held_out = (PassageStream(store.open_store(f"{folder}/store{s}"), 0) for s in ("", "/held_out"))
    assert len(held_out.tokens) > 20
    assert not {tuple(t) for t in train.tokens.tolist()} & {tuple(t) for t in held_out.tokens.tolist()}


def test_end_to_end_training_predicts_better_than_reconstruction_does(folder, tmp_path):
    """On held-out text, after the same steps on the same tokens, from the same start; and reconstructs worse."""
    changes = {
        "dictionary": {"wiring": {"kind": "sae", "layers": [2]}, "features": 128, "gate": {"kind": "topk", "k": 4}},
        "train.steps": 120,
        "train.batch_tokens": 120,
        "train.lr": 0.01,
        "train.loss": {"auxk": {}},
        "train.checkpoint_every": 1000,
    }
    held_out, found = store.open_store(f"{folder}/store/held_out"), {}
    for name, loss in {"end_to_end": {"downstream": 0.1}, "local": {"kl": 0.0, "reconstruction": 1.0}}.items():
        config = texts.settings(folder, changes | {"train.end_to_end": loss, "out": f"{tmp_path}/{name}"})
        train_alone(config)
        found[name] = evaluate(checkpoint.load_dictionary(config.out)[0], config, held_out)
        shutil.rmtree(config.out)
    assert found["end_to_end"]["kl"] < 0.8 * found["local"]["kl"]
    assert found["end_to_end"]["ce_recovered"] > found["local"]["ce_recovered"]
    assert found["end_to_end"]["explained_variance"] < found["local"]["explained_variance"]
    assert found["end_to_end"]["l0"] == found["local"]["l0"] == pytest.approx(4, abs=0.05)


def test_where_an_error_of_a_site_is_not_that_of_the_site_itself():
    assert later("resid_post.1", 4) == later("mlp_out.1", 4) == ["resid_post.2", "resid_post.3"]
    assert (
        later("mlp_in.1", 4)
        == later("resid_pre.1", 4)
        == later("attn_out.1", 4)
        == ["resid_post.1", *later("resid_post.1", 4)]
    )
    assert later("resid_post.3", 4) == []


def test_divergence_of_predictions_that_rule_tokens_out():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]], requires_grad=True)
    found = divergence(p.log(), q.log())
    assert found.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert torch.autograd.grad(found, q)[0].tolist() == [[-2.0, -1.0, 0.0]]


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_other_wirings_are_refused_in_one_line(folder, kind):
    with pytest.raises(UserError, match=rf"train\.end_to_end: cannot train {kind}.*allowed.*: sae, transcoder$"):
        texts.settings(folder, {"dictionary.wiring": {"kind": kind}})


def test_mistakes_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="kl, downstream and reconstruction are all 0"):
        texts.settings(folder, {"train.end_to_end": {"kl": 0}})
    last = {"dictionary.wiring": {"kind": "sae", "layers": [3]}, "train.end_to_end": {"downstream": 1}}
    with pytest.raises(UserError, match=r"downstream: no block of the model comes after resid_post\.3; set it to 0"):
        train_alone(texts.settings(folder, last | {"out": f"{tmp_path}/run"}))
    other = texts.settings(folder, {"model.name": str(texts.ROOT / "configs/assets/tiny-austen-gpt2")})
    with pytest.raises(UserError, match=r"model\.name: .*tiny-austen-gpt2; .* are of .*d64"):
        train_alone(other.override({"out": f"{tmp_path}/run"}))
