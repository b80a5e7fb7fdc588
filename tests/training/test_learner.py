"""One optimizer step, piece by piece."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dictionary import make
from tests.equivalence import cases
from xlc_ray.config.losses import Constant, Linear
from xlc_ray.dictionary import Shards, encoding, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Diverged, Learner
from xlc_ray.training.learner import _square
from xlc_ray.training.schedules import factor

CLT = wiring.clt([0, 1], 6)
RELU = {"kind": "relu"}


def learner(gate=RELU, loss=None, wires=CLT, **changes) -> Learner:
    settings = cases.config(gate, loss or {}, **changes)
    return Learner(build(settings.dictionary, wires, 3, Shards()), settings)


def parameters(made: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.parameters.items()}


def norm(tensors) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def test_four_micro_batches_are_one_batch():
    once, often = (learner(loss={**cases.L1, **cases.AUXK}, **{"train.accumulate": n}) for n in (1, 4))
    for batch in cases.batches(CLT)[:6]:
        one, two = once.train_step(batch, measure=True), often.train_step(batch, measure=True)
        for key in ("loss", "reconstruction", "sparsity", "l0", "dead_features", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-11), key
        for p, q in zip(once.parameters.values(), often.parameters.values(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(once.silent, often.silent, strict=True))


@pytest.mark.parametrize("rank_by", ["activation", "zscore"])
def test_thresholds_are_of_all_micro_batches(rank_by):
    """Places of a token do not depend on how a batch is cut; nor then does what inference compares with."""
    gate = {"kind": "topk", "k": 2, "rank_by": rank_by, "threshold_start": 0, "threshold_decay": 0.5}
    once, often = (learner(gate, **{"train.accumulate": n, "train.lr": 1e-15}) for n in (1, 4))
    for batch in cases.batches(CLT)[:3]:
        found = [made.train_step(batch, measure=True) for made in (once, often)]
    ours, theirs = (made.dictionary.gate for made in (once, often))
    if rank_by == "activation":
        torch.testing.assert_close(theirs.inference_threshold, ours.inference_threshold, rtol=1e-12, atol=0)
    else:  # spread is about each micro-batch's own mean
        for one, other in zip(ours.zscores.mean, theirs.zscores.mean, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    assert found[1]["reconstruction"] == pytest.approx(found[0]["reconstruction"], rel=0.2)


def test_explained_variance_of_micro_batches_is_a_ratio_of_sums():
    """One row has no spread of its own: that micro-batch must not decide."""
    batch = cases.batches(CLT)[0]
    made = learner(**{"train.accumulate": cases.ROWS // 2, "train.lr": 1e-15})
    assert -10 < made.train_step(batch, measure=True)["explained_variance"] < 1
    single = learner(**{"train.accumulate": cases.ROWS, "train.lr": 1e-15})
    assert math.isnan(single.train_step(batch, measure=True)["explained_variance"])


def test_reduced_precision_casts_the_encoder_as_often_for_many_tiles_as_for_one(monkeypatch):
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == weight.shape:
                self.count += 1
            return function(*args, **(kwargs or {}))

    wires = wiring.sae(["a"], 6)
    made = learner({"kind": "batchtopk", "k": 2}, wires=wires, **{"train.precision": "bfloat16"})
    weight, counts = made.dictionary.groups[0].W_enc, []
    for tile in (1 << 20, 8):  # entries: all in one, and two tokens in each
        monkeypatch.setattr(encoding, "TILE", tile)
        with Casts() as casts, torch.no_grad():
            made.dictionary.encode(make.random(cases.ROWS, 6).float())
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


def test_silence_is_counted_in_tokens_and_ends_with_one_activation():
    made = learner(wires=wiring.sae(["a"], 6), **{"train.dead_after_tokens": 3 * cases.ROWS, "train.accumulate": 2})
    group, quiet = made.dictionary.groups[0], torch.arange(10) < 4
    batches = [{"a": make.random(cases.ROWS, 6, seed=i)} for i in range(5)]
    found = []
    for i, batch in enumerate(batches):
        with torch.no_grad():
            group.W_enc[quiet], group.b_enc[quiet] = 0.0, -1.0
            group.b_enc[~quiet] = 50.0
            if i == 3:  # feature 0 fires on one token of the first micro-batch alone
                group.W_enc[0], group.b_enc[0] = 100 * batch["a"][2], -100 * batch["a"][2].square().sum() + 1e-6
        metrics = made.train_step(batch, measure=True)
        assert made.silent[0][~quiet].eq(0).all()
        found.append(
            (made.silent[0][0].item() // cases.ROWS, made.silent[0][1].item() // cases.ROWS, metrics["dead_features"])
        )
    assert found == [(1, 1, 0), (2, 2, 0), (3, 3, 0.4), (0, 4, 0.3), (1, 5, 0.3)]


def test_gradients_are_clipped_by_their_global_norm():
    free, clipped = (learner(loss=cases.L1, **{"train.clip_norm": c}) for c in (None, 0.5))
    batch = cases.batches(CLT)[0]
    one, two = free.train_step(batch, measure=True), clipped.train_step(batch, measure=True)
    whole = norm(p.grad for p in free.parameters.values())
    assert whole > 1
    assert one["grad_norm"] == two["grad_norm"] == pytest.approx(whole)
    for p, q in zip(free.parameters.values(), clipped.parameters.values(), strict=True):
        torch.testing.assert_close(q.grad, p.grad * 0.5 / whole)


def test_the_norm_of_a_large_gradient_is_that_of_its_parts():
    """2^24 numbers: added up in float32 they come out 2 % low, by how much depends on how ranks share them."""
    rows = torch.full((2**15, 2**9 + 1), 0.1)
    want = rows.numel() * 0.1**2
    assert _square([rows]).item() == pytest.approx(want, rel=1e-5)
    assert _square([*rows[3:].chunk(7), rows[:3, 0], rows[:3, 1:]]).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("measure", [False, True])
def test_the_host_waits_for_the_device_once_a_step_and_once_for_its_metrics(measure):
    class Waits(TorchFunctionMode):
        count = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.count += function.__name__ in ("item", "tolist", "__bool__", "__int__", "__float__")
            return function(*args, **(kwargs or {}))

    made, batches = learner(**{"dictionary.products": "dense"}), cases.batches(CLT)
    made.train_step(batches[0], measure)
    with Waits() as waits:
        made.train_step(batches[1], measure)
    assert waits.count == 1 + measure


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_limit_is_exact(share):
    free = learner(**{"train.clip_norm": None})
    batch = cases.batches(CLT)[0]
    whole = free.train_step(batch, measure=True)["grad_norm"]
    clipped = learner(**{"train.clip_norm": share * whole})
    clipped.train_step(batch, measure=False)
    assert norm(p.grad for p in clipped.parameters.values()) == pytest.approx(min(share, 1) * whole)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_first_step_is_adams_with_the_scheduled_rate(kind):
    changes = {"train.optimizer": {"kind": kind, "weight_decay": 0.1, "eps": 0.01}, "train.clip_norm": None}
    made = learner(**changes, **{"train.lr_schedule": {"kind": "constant", "warmup": 0.5}})
    before = parameters(made)
    metrics = made.train_step(cases.batches(CLT)[0], measure=True)
    lr = 0.01 / 10  # the first of ten steps of warm-up
    assert metrics["lr"] == pytest.approx(lr)
    for name, p in made.parameters.items():
        g, old = p.grad, before[name]
        if kind == "adam":
            g = g + 0.1 * old
        want = old * (1 - lr * 0.1 if kind == "adamw" else 1) - lr * g / (g.abs() + 0.01)
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-10, msg=name)


def test_rates_and_penalties_follow_their_schedules():
    rise = {"sparsity": {"kind": "l1", "coefficient": 0.3, "schedule": {"kind": "constant", "warmup": 0.2}}}
    made = learner(loss=rise)
    for i, batch in enumerate(cases.batches(CLT)):
        m = made.train_step(batch, measure=True)
        weight = 0.3 * factor(Constant(warmup=0.2), i, cases.STEPS)
        assert m["loss"] == pytest.approx(m["reconstruction"] + weight * m["sparsity"], rel=1e-12)
        assert m["lr"] == pytest.approx(0.01 * factor(Linear(), i, cases.STEPS))
        assert m["sparsity"] > 0
    assert made.step == cases.STEPS


def test_auxk_counts_by_how_many_are_dead():
    made = learner(loss={"auxk": {"k": 4, "coefficient": 0.5}})
    made.silent[0][:3] = 10**9
    made.dead_totals = [3, 0]
    batch = cases.batches(CLT)[0]
    m = made.train_step(batch, measure=True)
    assert m["auxk"] > 0
    assert m["loss"] == pytest.approx(m["reconstruction"] + 0.5 * m["auxk"], rel=1e-12)


def test_auxk_is_in_the_units_of_the_reconstruction():
    """ê = 0 would make the auxiliary loss the reconstruction loss itself, under either scale, but for the factor."""
    for scale in ("canonical", "per_dim"):
        made = learner(loss={"auxk": {"k": 4}, "scale": scale})
        made.silent[0][:3], made.dead_totals = 10**9, [3, 0]
        with torch.no_grad():
            made.dictionary.groups[0].W_dec[:3] = 0
        m = made.train_step(cases.batches(CLT)[0], measure=True)
        assert m["auxk"] == pytest.approx(3 / (4 * 2) * m["reconstruction"], rel=1e-12)


def test_auxk_reads_half_a_site_by_default():
    assert learner(loss={"auxk": {}}).objective.auxk == 3
    assert learner().objective.auxk == 0


def test_measured_reconstruction_and_l0_are_those_of_the_definition():
    made = learner({"kind": "topk", "k": 3, "pool": "group"})
    batch = cases.batches(CLT)[0]
    d = made.dictionary
    x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
    features = d.encode(x)
    l0 = [f.l0().double().mean().item() for f in features]
    error = (y - d.decode(features, x)).square().sum().item()
    m = made.train_step(batch, measure=True)
    assert m["reconstruction"] == pytest.approx(error / cases.ROWS)
    assert m["explained_variance"] == pytest.approx(1 - error / (y - y.mean(dim=0)).square().sum().item())
    assert [m["l0/group_0"], m["l0/group_1"], m["l0"]] == pytest.approx([*l0, sum(l0)])
    assert max(l0) == 3
    assert made.train_step(batch, measure=False) is None


@pytest.mark.parametrize("where", ["mlp_in.0", "mlp_out.1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gate", [RELU, {"kind": "batchtopk", "k": 2}], ids=["relu", "batchtopk"])
@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_activations_that_are_not_finite_stop_training(where, value, gate, products):
    """Pitfall 18: not skipped without a word, even where no feature is chosen; the parameters stay what they were."""
    made = learner(gate, **{"dictionary.products": products})
    batch = cases.batches(CLT)[0]
    made.train_step(batch, measure=False)
    before = parameters(made)
    batch[where][3, 2] = value
    with pytest.raises(Diverged, match="step 2: the gradient norm is"):
        made.train_step(batch, measure=False)
    assert made.step == 1
    assert all(torch.equal(p, before[name]) for name, p in made.parameters.items())


def test_unit_norm_holds_rows_and_removes_the_gradient_along_them():
    made = learner(
        {"kind": "topk", "k": 3},
        **{"dictionary.unit_norm": True, "dictionary.decoder_norm": 0.1, "train.clip_norm": None},
    )
    for i, batch in enumerate(cases.batches(CLT)[:8]):
        before = [g.W_dec.detach().clone() for g in made.dictionary.groups]
        made.train_step(batch, measure=False)
        for group, rows in zip(made.dictionary.groups, before, strict=True):
            assert group.W_dec.grad.any()
            along = (group.W_dec.grad * rows).sum(dim=1)
            assert along.abs().max() < (1e-12 if i else 1e-6)  # the first rows are float32's
            torch.testing.assert_close(group.norms().detach(), torch.ones(10).double(), rtol=1e-12, atol=1e-12)
            assert not torch.equal(group.W_dec, rows)


def test_training_learns_features_that_are_there():
    """20 tokens' worth of known directions, one active a token: the loss falls to a small part of the variance."""
    wires = wiring.sae(["a"], 6)
    made = learner(
        {"kind": "topk", "k": 1}, wires=wires, **{"train.steps": 300, "train.lr": 0.02, "train.batch_tokens": 64}
    )
    atoms, draw = make.random(6, 6, seed=5), make.generator(6)
    atoms = torch.linalg.qr(atoms).Q
    metrics = None
    for _ in range(300):
        which = torch.randint(6, (64,), generator=draw)
        metrics = made.train_step({"a": 2 * atoms[which]}, measure=True)
    assert metrics["explained_variance"] > 0.9


def test_bfloat16_products_keep_float32_weights_and_nearly_the_same_loss():
    exact, reduced = (learner(loss=cases.L1, **{"train.precision": p}) for p in ("float32", "bfloat16"))
    batch = {site: v.float() for site, v in cases.batches(CLT)[0].items()}
    one, two = exact.train_step(batch, measure=True), reduced.train_step(batch, measure=True)
    assert {p.dtype for p in reduced.parameters.values()} == {torch.float32}
    assert {p.grad.dtype for p in reduced.parameters.values()} == {torch.float32}
    assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert two["loss"] != one["loss"]


def test_thresholds_that_training_drives_down_stop_at_zero():
    """Below it a feature could be negative."""
    jump = {"kind": "jumprelu", "threshold": 0.02, "bandwidth": 0.5, "parameterisation": "direct"}
    made = learner(jump, {"preactivation": 10.0})
    for batch in cases.batches(CLT)[:8]:
        made.train_step(batch, measure=False)
        features = made.dictionary.encode(made.dictionary.normalize_inputs(batch))
        assert all((f.dense() >= 0).all() for f in features)
        assert all((t >= 0).all() for t in made.dictionary.gate.raw_threshold)
    assert any((t == 0).any() for t in made.dictionary.gate.raw_threshold)
