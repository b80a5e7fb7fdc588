"""Loss and every gradient of a step against the same mathematics written plainly: dense, in one piece, by autograd.

The plain version knows neither supports, nor fused decoding, nor shards; detached is what the papers freeze.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.dictionary import make
from tests.equivalence import cases
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.build import build
from xlc_ray.dictionary.noise import key_of, uniform
from xlc_ray.training import Learner

LAMBDA, STEP = 0.3, 10  # a step in the middle of the run, where β and p have moved
L1 = {"sparsity": {"kind": "l1", "coefficient": LAMBDA}}
L0 = {"sparsity": {"kind": "l0", "coefficient": LAMBDA}}
BETA = {"beta": 0.7, "final_beta": 0.3, "beta_hold": 0.0}
HELD = 5
"""Steps before p moves in `lp`: a quarter of the run."""
CASES = {
    "gated": ({"kind": "gated", "auxiliary": 0.6}, L1),
    "by_input": ({"kind": "hard_concrete", "alpha": -0.4, **BETA}, L0),
    "free": ({"kind": "hard_concrete", "input_dependent": False, "alpha": -0.4, **BETA}, L0),
    "both": ({"kind": "gated_hard_concrete", "auxiliary": 0.6, **BETA}, L0),
    "both_without": ({"kind": "gated_hard_concrete", "auxiliary": 0.0, **BETA}, L0),
    "to_target": ({"kind": "hard_concrete", **BETA}, {"sparsity": {**L0["sparsity"], "target_l0": 5.0}}),
    "lp": (
        {"kind": "relu"},
        {"sparsity": {**L1["sparsity"], "kind": "lp", "p_end": 0.4, "p_hold": 0.25, "keep_strength": False}},
    ),
    "gated_lp": ({"kind": "gated"}, {"sparsity": {**L1["sparsity"], "kind": "lp", "p_end": 0.4}}),
    "nested": ({"kind": "topk", "k": 2, "pool": "group"}, {"matryoshka": {"prefixes": [0.2, 0.5, 1.0]}}),
    "nested_sum": ({"kind": "gated"}, {**L1, "matryoshka": {"prefixes": [0.3, 1.0], "combine": "sum"}}),
}


def made(case: str, wires, products: str) -> Learner:
    gate, loss = CASES[case]
    settings = cases.config(gate, loss, **{"dictionary.products": products, "train.clip_norm": None})
    learner = Learner(build(settings.dictionary, wires, 3, Shards()), settings)
    noise = make.generator(9)
    with torch.no_grad():
        for p in learner.parameters.values():
            p += 0.2 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
    learner.step = STEP
    return learner


def hard(gate, alpha, g):
    """z with the noise of pass 1 of the step."""
    token, feature = torch.arange(len(alpha)).unsqueeze(1), torch.arange(alpha.shape[1])
    u = uniform(key_of(3, STEP, 1, g), token, feature, torch.float64)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + alpha) / beta())
    return (s * 1.2 - 0.1).clamp(0, 1)


def beta() -> float:
    return 0.7 * (0.3 / 0.7) ** (STEP / (cases.STEPS - 1))


def expected(alpha):
    return torch.sigmoid(alpha - beta() * math.log(0.1 / 1.1))


def forms(case: str, gate, g: int, group, x):
    """f, what the penalty sums over features (before weights by norms), the code of the auxiliary loss."""
    pre = x @ group.W_enc.T + group.b_enc
    if case in ("gated", "gated_lp", "nested_sum"):
        pi = pre + gate.b_gate[g]
        f = (pi > 0) * torch.relu(torch.exp(gate.r_mag[g]) * pre + gate.b_mag[g])
        return f, torch.relu(pi), torch.relu(pi)
    if case in ("by_input", "to_target"):
        return hard(gate, pre, g) * (x @ gate.W_mag[g].T + gate.b_mag[g]), expected(pre), None
    if case == "free":
        alpha = gate.alpha[g].expand_as(pre)
        return hard(gate, alpha, g) * pre, expected(alpha), None
    if case.startswith("both"):
        z = hard(gate, pre + gate.b_gate[g], g)
        f = z * torch.relu(torch.exp(gate.r_mag[g]) * pre + gate.b_mag[g])
        return f, expected(pre + gate.b_gate[g]), z
    if case == "nested":
        kept = torch.relu(pre).topk(2, dim=1)
        return torch.zeros_like(pre).scatter(1, kept.indices, kept.values), None, None
    return torch.relu(pre), torch.relu(pre), None


def plain_loss(case: str, learner: Learner, batch) -> torch.Tensor:
    gate_settings, loss = CASES[case]
    d = learner.dictionary
    wires, gate = d.wiring, d.gate
    x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
    read, written = wires.columns(wires.read_sites), wires.columns(wires.written_sites)
    prefixes = loss.get("matryoshka", {"prefixes": [1.0]})["prefixes"]
    y_hat = [{s: d.b_dec[c].expand_as(y[:, c]) for s, c in written.items()} for _ in prefixes]
    frozen = {s: d.b_dec[c].detach().expand_as(y[:, c]) for s, c in written.items()}
    penalties, auxiliary, plain = [], False, []
    for g, group in enumerate(d.groups):
        mine = torch.cat([x[:, read[s]] for s in wires.reads[g]], dim=1)
        f, penal, aux = forms(case, gate, g, group, mine)
        norm = group.W_dec.square().sum(dim=1).sqrt()
        start = 0
        for site in wires.writes[g]:
            rows = group.W_dec[:, start : start + wires.widths[site]]
            start += wires.widths[site]
            for p, share in enumerate(prefixes):
                some = round(share * f.shape[1])
                y_hat[p][site] = y_hat[p][site] + f[:, :some] @ rows[:some]
            if aux is not None:
                auxiliary = True
                frozen[site] = frozen[site] + aux @ rows.detach()
            if wires.skip:
                y_hat = [{**h, site: h[site] + mine @ d.W_skip[g].T} for h in y_hat]
                frozen[site] = frozen[site] + (mine @ d.W_skip[g].T).detach()
        kind = loss.get("sparsity", {}).get("kind")
        if kind == "lp":
            held = HELD if case == "lp" else 0
            power = 1 - 0.6 * (STEP - held) / (cases.STEPS - 1 - held)
            plain.append((penal * norm).sum())
            penalties.append(((penal * norm + 1e-6) ** power - 1e-6**power).sum())
        elif kind:
            penalties.append((penal * norm).sum() if kind == "l1" else penal.sum())
    rows = len(x)
    errors = [sum((h[s] - y[:, c]).square().sum() for s, c in written.items()) / rows for h in y_hat]
    total = sum(errors) if "sum" in case else sum(errors) / len(errors)
    if penalties:
        penalty = sum(penalties) / rows
        if case == "gated_lp":
            penalty = penalty * (sum(plain) / rows / penalty).detach()
        total = total + LAMBDA * ((penalty / 5.0 - 1) ** 2 if case == "to_target" else penalty)
    if auxiliary:
        weight = gate_settings.get("auxiliary", 1.0)
        total = total + weight * sum((frozen[s] - y[:, c]).square().sum() for s, c in written.items()) / rows
    return total


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("wiring", ["clt", "skip_transcoders", "ragged_widths"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_plain_mathematics(case, wiring, products):
    wires = cases.WIRINGS[wiring]
    learner = made(case, wires, products)
    batch = cases.batches(wires)[0]
    want = plain_loss(case, learner, batch)
    names = list(learner.parameters)
    grads = torch.autograd.grad(want, list(learner.parameters.values()), allow_unused=True)
    found = learner.train_step(batch, measure=True)
    assert found["loss"] == pytest.approx(want.item(), rel=1e-12)
    for name, grad in zip(names, grads, strict=True):
        got = learner.parameters[name].grad
        torch.testing.assert_close(
            got, torch.zeros_like(got) if grad is None else grad, rtol=1e-9, atol=1e-11, msg=name
        )


@pytest.mark.parametrize("case", ["gated", "by_input", "free", "both"])
def test_gates_learn(case):
    """Pitfall 17: every parameter of the gate moves, the penalty is no constant, and the decoder is not pulled by the
    auxiliary loss."""
    learner = made(case, cases.WIRINGS["clt"], "sparse")
    learner.step = 0
    before = {n: p.detach().clone() for n, p in learner.parameters.items() if n.startswith("gate.")}
    found = [learner.train_step(b, measure=True) for b in cases.batches(cases.WIRINGS["clt"])]
    assert len(before) >= 3
    assert all((learner.parameters[n] - old).abs().min() > 0 for n, old in before.items())
    assert len({f["sparsity"] for f in found}) == len(found)
    assert found[-1]["loss"] < found[0]["loss"]


def test_beta_is_held_then_falls_to_its_end_by_optimizer_step():
    gate = {"kind": "hard_concrete", "beta": 0.5, "final_beta": 0.1, "beta_hold": 0.5}
    settings = cases.config(gate, L0, **{"train.accumulate": 2})
    wires = cases.WIRINGS["clt"]
    learner = Learner(build(settings.dictionary, wires, 3, Shards()), settings)
    betas = []
    for batch in cases.batches(wires):
        learner.train_step(batch, measure=False)
        betas.append(learner.dictionary.gate.beta)
    assert betas[:11] == [0.5] * 11
    assert betas[-1] == pytest.approx(0.1)
    ratios = [b / a for a, b in pairwise(betas[10:])]
    assert ratios == pytest.approx([ratios[0]] * 9)
    assert ratios[0] < 1


def test_a_resumed_run_draws_the_same_noise():
    """Noise is a function of the step, so nothing of it needs saving."""
    gate, wires = {"kind": "gated_hard_concrete"}, cases.WIRINGS["clt"]
    settings = cases.config(gate, L0)
    whole, resumed = (Learner(build(settings.dictionary, wires, 3, Shards()), settings) for _ in range(2))
    batches = cases.batches(wires)
    for batch in batches[:3]:
        whole.train_step(batch, measure=False)
    with torch.no_grad():
        for name, value in whole.state().items():
            resumed.state()[name].copy_(value)
    resumed.step = 3
    for batch in batches[3:5]:
        one, two = whole.train_step(batch, measure=True), resumed.train_step(batch, measure=True)
        assert one["loss"] == two["loss"]


def test_silent_features_do_not_break_lp():
    """f^p has an infinite slope at 0: rows of zeros and silent features must give finite gradients (pitfall 18)."""
    learner = made("gated_lp", cases.WIRINGS["clt"], "dense")
    with torch.no_grad():
        learner.dictionary.groups[0].W_dec[:3] = 0
        learner.dictionary.groups[1].b_enc[:3] = -100
    found = learner.train_step(cases.batches(cases.WIRINGS["clt"])[0], measure=True)
    assert math.isfinite(found["grad_norm"])
