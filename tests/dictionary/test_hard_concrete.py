"""Hard-concrete and gated features: the gate by its formula, its noise, training and inference forms."""

import math

import pytest
import torch

from tests.dictionary import make
from tests.dictionary.test_gates import masks
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, wiring
from xlc_ray.dictionary.build import build, make_gate
from xlc_ray.dictionary.fold import fold
from xlc_ray.dictionary.noise import key_of, uniform

LIMIT = math.log(0.1 / 1.1)
KINDS = {
    "gated": {"kind": "gated"},
    "by_input": {"kind": "hard_concrete"},
    "free": {"kind": "hard_concrete", "input_dependent": False},
    "both": {"kind": "gated_hard_concrete"},
}


def hard_concrete(features, alpha=0.0, beta=0.5, **changes):
    config = settings.HardConcreteGate(input_dependent=False, alpha=alpha, beta=beta, **changes)
    gate = make_gate(config, [features], Shards()).double()
    gate.start_step(0, 10)
    gate.start_pass()
    return gate


def scattered(wires, kind, **changes):
    """A dictionary whose gate's parameters are random too."""
    d = make.dictionary(wires, KINDS[kind], **changes)
    with torch.no_grad():
        for i, p in enumerate(d.gate.parameters()):
            p += 0.5 * make.random(*p.shape, seed=50 + i)
    return d


# ---------------------------------------------------------------- noise


def test_noise_is_uniform_and_unrelated_between_neighbours():
    rows, columns = torch.arange(400).unsqueeze(1), torch.arange(500)
    u = uniform(key_of(0, 1), rows, columns, torch.float64)
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 85  # χ² with 49 degrees of freedom: 85 at one in a thousand
    assert 0 < u.min() < u.max() < 1
    pairs = {
        "rows": (u[1:], u[:-1]),
        "columns": (u[:, 1:], u[:, :-1]),
        "diagonal": (u[1:, 1:], u[:-1, :-1]),
        "keys": (u, uniform(key_of(0, 2), rows, columns, torch.float64)),
        "bits": (u, (u * 1024) % 1),
    }
    for name, (a, b) in pairs.items():
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01, name


def test_float32_draws_stay_within_zero_and_one():
    u = uniform(1, torch.arange(3000).unsqueeze(1), torch.arange(3000), torch.float32)
    assert u.min() > 0
    assert u.max() < 1
    assert torch.isfinite(torch.logit(u)).all()


def test_noise_differs_by_step_pass_and_group_and_repeats():
    pre = torch.ones(20, 6).double()

    def drawn(seed=0, step=0, passes=1, g=0):
        gate = make_gate(settings.HardConcreteGate(input_dependent=False), [6, 6], Shards()).double()
        gate.initialise(seed, [0, 0], [])
        gate.start_step(step, 10)
        for _ in range(passes):
            gate.start_pass()
        return gate.activate(pre, g, None)

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(step=1), drawn(passes=2), drawn(g=1)):
        assert not torch.equal(drawn(), other)


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_the_expected_l0_is_how_often_gates_are_open(alpha, beta):
    """Louizos 2017: P(z > 0) = σ(α - β log(-γ/ζ)); also P(z = 1) by the same argument at the other end."""
    gate, pre = hard_concrete(50, alpha, beta), torch.ones(4000, 50).double()
    z = gate.activate(pre, 0, None)
    want = 1 / (1 + math.exp(-(alpha - beta * LIMIT)))
    assert (z > 0).double().mean().item() == pytest.approx(want, abs=0.005)
    full = 1 / (1 + math.exp(-(alpha + beta * LIMIT)))
    assert (z == 1).double().mean().item() == pytest.approx(full, abs=0.005)
    assert gate.count([], None).item() == pytest.approx(50 * want)


def test_at_inference_there_is_neither_noise_nor_temperature():
    gate = hard_concrete(5).eval()
    with torch.no_grad():
        gate.alpha[0].copy_(torch.tensor([-3.0, -2.0, 0.0, 1.0, 3.0]))
    f = gate.activate(-2 * torch.ones(3, 5).double(), 0, None)
    z = [min(1, max(0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in (-3, -2, 0, 1, 3)]
    assert z[0] == 0
    assert z[4] == 1
    for row in f:  # magnitudes have a sign
        assert row.tolist() == pytest.approx([-2 * v for v in z])


def test_z_is_stretched_as_far_as_the_settings_say():
    """Louizos 2017 with another γ and ζ than the default's: values, what is open, the expected L0, inference."""
    gate, pre = hard_concrete(6, 0.4, 0.7, gamma=-0.25, zeta=1.4), make.random(40, 6)
    u = uniform(key_of(0, 0, 1, 0), torch.arange(40).unsqueeze(1), torch.arange(6), torch.float64)

    def z(s):
        return (s * (1.4 + 0.25) - 0.25).clamp(0, 1)

    want = z(torch.sigmoid((torch.log(u) - torch.log(1 - u) + 0.4) / 0.7))
    assert {0.0, 1.0} < set(want.flatten().tolist())
    torch.testing.assert_close(gate.activate(pre, 0, None), want * pre)
    assert torch.equal(masks(gate, {0: pre})[0], want > 0)
    assert gate.count([], None).item() == pytest.approx(6 / (1 + math.exp(-0.4 + 0.7 * math.log(0.25 / 1.4))))
    gate.eval()
    with torch.no_grad():
        gate.alpha[0].copy_(torch.tensor([-3.0, -1.8, -1.6, 0.0, 1.0, 3.0]))  # σ(α) = 0.25 / 1.65 at -1.72
    want = z(torch.sigmoid(gate.alpha[0])).expand(40, 6)
    torch.testing.assert_close(gate.activate(pre, 0, None), want * pre)
    assert torch.equal(masks(gate, {0: pre})[0], want > 0)


@pytest.mark.parametrize(("kind", "start", "open_"), [("by_input", -3, False), ("both", -3, False), ("free", 0, True)])
def test_gates_that_read_the_input_start_closed_and_free_ones_open(kind, start, open_):
    wires = wiring.sae(["a"], 4)
    made = build(make.section(KINDS[kind]), wires, 0, Shards()).double().eval()
    alpha = made.gate.logit(made.groups[0].b_enc, 0, None)
    assert alpha.tolist() == [start] * 7
    assert (made.gate.openness(made.groups[0].b_enc, 0, None) > 0).all() == open_


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_selected_is_zero(kind, training):
    gate = make_gate(settings.Dictionary.model_validate(tree(kind)).gate, [8], Shards()).double().train(training)
    gate.start_pass()
    pre = 3 * make.random(60, 8)
    with torch.no_grad():
        for i, p in enumerate(gate.parameters()):
            p += 4 * make.random(*p.shape, seed=i)
    mask = masks(gate, {0: pre})[0]
    f = gate.activate(pre, 0, None)
    assert not f[~mask].any()
    assert 0.1 < mask.double().mean() < 0.9
    if gate.auxiliary:
        assert not gate.auxiliary_values(pre, 0, None)[~mask].any()
    sub = make.support(mask)
    torch.testing.assert_close(gate.activate(pre[mask], 0, sub), f[mask])


def tree(kind):
    return {"wiring": {"kind": "clt"}, "features": 8, "gate": KINDS[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    gate = make_gate(settings.Dictionary.model_validate(tree(kind)).gate, [4], Shards()).double()
    gate.start_pass()
    own = [p for p in gate.parameters() if p.shape == (4,)]
    pre = (2 * make.random(6, 4)).requires_grad_()
    start = [(0.3 * make.random(4, seed=i)).requires_grad_() for i in range(len(own))]

    def run(pre, *values):
        for p, v in zip(own, values, strict=True):
            p.data = v.data
        names = [n for n, p in gate.named_parameters() if p.shape == (4,)]
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (pre,))

    gate.forward = lambda pre: (gate.activate(pre, 0, None), gate.penalised(pre, pre, 0, None))
    assert torch.autograd.gradcheck(run, (pre, *start))


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_alone_and_tokens_alone_encode_as_together(kind, products):
    wires = wiring.clt([0, 1], 4)
    d = scattered(wires, kind, products=products).eval()
    batch = make.activations(wires, 9)
    x = d.normalize_inputs(batch)
    together = [f.dense() for f in d.encode(x)]
    assert any(f.any() for f in together)
    for g, want in enumerate(together):
        torch.testing.assert_close(d.encode_group(g, batch).dense(), want)
    alone = [torch.cat(rows) for rows in zip(*([f.dense() for f in d.encode(r[None])] for r in x), strict=True)]
    for got, want in zip(alone, together, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_features(kind):
    """The second encoder reads the input too."""
    wires = wiring.clt([0, 1], 4)
    d = scattered(wires, kind).eval()
    with torch.no_grad():
        d.read_mean += make.random(8, seed=1)
        d.read_scale *= make.random(8, seed=2).exp()
        d.write_scale *= make.random(8, seed=3).exp()
    batch = make.activations(wires, 9)
    folded = fold(d)
    for f, want in zip(folded.encode(folded.normalize_inputs(batch)), d.encode(d.normalize_inputs(batch)), strict=True):
        torch.testing.assert_close(f.dense(), want.dense())
    for site, want in d.reconstruct(batch).items():
        torch.testing.assert_close(folded.reconstruct(batch)[site], want)


def test_gated_features_start_as_relu_and_the_gate_decides():
    wires = wiring.sae(["a"], 4)
    d, relu = make.dictionary(wires, KINDS["gated"]), make.dictionary(wires)
    with torch.no_grad():
        for p in d.gate.parameters():
            p.zero_()  # as built
    x = make.random(12, 4)
    relu.load_state_dict({n: v for n, v in d.state_dict().items() if not n.startswith("gate.")})
    torch.testing.assert_close(d.encode(x)[0].dense(), relu.encode(x)[0].dense())
    with torch.no_grad():
        d.gate.b_gate[0][0], d.gate.b_mag[0][0] = -1e3, 1e6  # strong, but closed
        d.gate.b_gate[0][1], d.gate.b_mag[0][1] = 1e3, 2e6  # open
    f = d.encode(x)[0].dense()
    assert not f[:, 0].any()
    assert (f[:, 1] > 1e6).all()
