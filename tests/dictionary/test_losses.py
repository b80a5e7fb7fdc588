"""Every loss term by hand, and its scale: a sum over width and features, a mean over tokens (pitfall 21)."""

import math

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Features, Shards, losses, nested, wiring
from xlc_ray.dictionary.build import make_gate
from xlc_ray.dictionary.encoding import DeadFeatures

F1 = torch.tensor([[1.0, 0.0], [2.0, 3.0]]).double()
F2 = torch.tensor([[0.0], [0.5]]).double()
N1, N2 = torch.tensor([2.0, 0.5]).double(), torch.tensor([4.0]).double()


def sparse_form(f: torch.Tensor) -> Features:
    support = make.support(f > 0)
    return Features(f[f > 0], f[f > 0], support)


@pytest.mark.parametrize("form", [lambda f: Features(f, f), sparse_form], ids=["dense", "sparse"])
def test_l1_and_tanh_by_hand(form):
    features, norms = [form(F1), form(F2)], [N1, N2]
    assert losses.l1(features, None).item() == pytest.approx((1 + 2 + 3 + 0.5) / 2)
    assert losses.l1(features, norms).item() == pytest.approx((2 + 4 + 1.5 + 2) / 2)
    weighted = sum(math.tanh(3 * v) for v in (2, 4, 1.5, 2)) / 2
    assert losses.tanh(features, norms, 3.0).item() == pytest.approx(weighted)
    assert losses.tanh(features, None, 0.1).item() == pytest.approx(sum(math.tanh(0.1 * v) for v in (1, 2, 3, 0.5)) / 2)


@pytest.mark.parametrize("form", [lambda f: Features(f, f), sparse_form], ids=["dense", "sparse"])
def test_lp_by_hand(form):
    features, norms = [form(F1), form(F2)], [N1, N2]
    powers = sum(v**0.3 for v in (2, 4, 1.5, 2)) / 2
    assert losses.lp(features, norms, 0.3, None).item() == pytest.approx(powers, rel=0.02)  # but for ε
    for weights in (norms, None):
        assert losses.lp(features, weights, 1.0, None).item() == pytest.approx(losses.l1(features, weights).item())
        held = losses.lp(features, weights, 0.3, Shards()).item()
        assert held == pytest.approx(losses.l1(features, weights).item())
    nothing = [form(torch.zeros_like(F1))]
    assert losses.lp(nothing, None, 0.3, Shards()).item() == 0


def test_the_strength_of_lp_is_a_number_without_gradient():
    f = torch.tensor([[0.5, 2.0]]).double().requires_grad_()
    losses.lp([Features(f, f)], None, 0.4, Shards()).backward()
    ratio = 2.5 / (0.5**0.4 + 2**0.4 - 2 * 1e-6**0.4)
    assert f.grad[0].tolist() == pytest.approx([ratio * 0.4 * 0.5**-0.6, ratio * 0.4 * 2**-0.6], rel=1e-5)


def test_p_falls_from_one_to_its_end():
    assert [losses.exponent(0.2, 0.0, i, 5) for i in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [losses.exponent(0.2, 0.4, i, 5) for i in range(5)] == pytest.approx([1, 1, 1, 0.6, 0.2])
    assert losses.exponent(0.2, 1.0, 4, 5) == 1


def test_reconstruction_by_hand_and_per_dim():
    y, y_hat = torch.zeros(2, 3).double(), torch.tensor([[1.0, 2, 3], [0, 0, 1]]).double()
    assert losses.reconstruction(y_hat, y, None).item() == pytest.approx(15 / 2)
    weights = losses.site_weights([2, 1], per_dim=True).double()  # two sites of widths 2 and 1
    assert losses.reconstruction(y_hat, y, weights).item() == pytest.approx(((1 + 4) / 2 + 9 + 1) / 2)
    assert losses.site_weights([2, 1], per_dim=False).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["log", "direct"])
def test_l0_and_its_target_by_hand(kind):
    config = settings.JumpReluGate(threshold=0.75, bandwidth=1.0, parameterisation=kind)
    gate = make_gate(config, [2, 1], Shards()).double()
    features = [Features(f * (f > 0.75), f.clone()) for f in (F1, F2)]
    assert losses.l0(features, gate).item() == pytest.approx(3 / 2)
    assert losses.l0_to_target(features, gate, 2.0, Shards()).item() == pytest.approx((1.5 / 2 - 1) ** 2)
    losses.l0_to_target(features, gate, 2.0, Shards()).backward()
    chain = 0.75 if kind == "log" else 1.0  # entries within ε/2 of θ: f = 1 in the first group, f = 0.5 in the second
    slope = 2 * (1.5 / 2 - 1) / 2
    assert gate.raw_threshold[0].grad.tolist() == pytest.approx([slope * -0.5 * chain, 0])
    assert gate.raw_threshold[1].grad.tolist() == pytest.approx([slope * -0.5 * chain])


def test_preactivation_by_hand():
    gate = make_gate(settings.JumpReluGate(threshold=0.75, parameterisation="direct"), [2], Shards()).double()
    pre = torch.tensor([[1.0, 0.5], [-1.0, -2.0]]).double()
    assert losses.preactivation([pre], gate, [N1]).item() == pytest.approx((0.25 * 0.5 + 1.75 * 2 + 2.75 * 0.5) / 2)
    relu = make_gate(settings.ReluGate(), [2], Shards())
    assert losses.preactivation([pre], relu, [N1]).item() == pytest.approx((1 * 2 + 2 * 0.5) / 2)


def test_doubling_the_batch_changes_no_loss():
    gate = make_gate(settings.JumpReluGate(threshold=0.3), [5], Shards()).double()
    pre, norms = make.random(6, 5), make.random(5, seed=1).abs()
    y, y_hat = make.random(6, 4, seed=2), make.random(6, 4, seed=3)

    def every(times: int) -> list[float]:
        p = pre.repeat(times, 1)
        f = [Features(p * (p > 0.3), p)]
        target, got = y.repeat(times, 1), y_hat.repeat(times, 1)
        terms = [
            losses.reconstruction(got, target, None),
            losses.l1(f, [norms]),
            losses.tanh(f, [norms], 4.0),
            losses.l0(f, gate),
            losses.l0_to_target(f, gate, 2.0, Shards()),
            losses.preactivation([p], gate, [norms]),
            losses.auxk(got, target, None),
        ]
        assert all(t > 0 for t in terms)
        return [t.item() for t in terms]

    assert every(2) == pytest.approx(every(1), rel=1e-12)


def test_auxk_detaches_the_error():
    error, hat = make.random(3, 4).requires_grad_(), make.random(3, 4, seed=1).requires_grad_()
    loss = losses.auxk(hat, error, None)
    loss.backward()
    assert error.grad is None
    torch.testing.assert_close(hat.grad, 2 * (hat - error).detach() / 3)
    assert loss.item() == pytest.approx((hat - error).square().sum().item() / 3)


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize(
    "gate", [{"kind": "relu"}, {"kind": "topk", "k": 2}, {"kind": "jumprelu"}], ids=lambda g: g["kind"]
)
def test_auxk_reconstructs_with_the_largest_dead_features_alone(gate, products):
    """Pitfall 16: no b_dec in ê, the encoder learns, alive features and the bias do not."""
    wires, k = wiring.clt([0, 1], 4), 2
    d = make.dictionary(wires, gate, products=products, features=24)
    x = d.normalize_inputs(make.activations(wires, 9))
    masks = [torch.arange(24) < 16, torch.arange(24) == 7]  # more and fewer dead than k
    code = d.analyse(x, DeadFeatures(masks, [16, 1], k))
    (y_hat, error_hat), _ = d.decode_all([code.features, code.revived], x)
    torch.testing.assert_close(y_hat, d.decode(code.features, x))

    want = torch.zeros_like(y_hat)
    for g, group in enumerate(d.groups):
        pre = x[:, wires.read_spans(g)[0]] @ group.W_enc.T + group.b_enc
        pre = pre.detach().where(masks[g], -1).clamp(min=0)
        assert ((pre > 0).sum(dim=1).max() > k) == (g == 0)
        chosen = pre.topk(k, dim=1)
        f = torch.zeros_like(pre).scatter(1, chosen.indices, chosen.values)
        want[:, wires.write_spans(g)[0]] += f @ group.W_dec.detach()
    assert want.any()
    torch.testing.assert_close(error_hat.detach(), want)

    error = make.random(*y_hat.shape, seed=8)
    losses.auxk(error_hat, error - y_hat, None).backward()
    assert d.b_dec.grad is None or not d.b_dec.grad.any()
    for mask, group in zip(masks, d.groups, strict=True):
        for p in (group.W_enc, group.b_enc, group.W_dec):
            assert not p.grad[~mask].any()
            assert p.grad[mask].any()


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_dead_features_that_tie_are_no_more_than_k(products):
    """Pitfall 20 in AuxK: the first of them win the places that are left."""
    wires, k = wiring.clt([0, 1], 4), 2
    d = make.dictionary(wires, {"kind": "relu"}, products=products, features=24)
    with torch.no_grad():
        d.groups[0].W_enc[:5] = 0  # else products might differ in the last bit
        d.groups[0].b_enc[:5] = 99
    x = d.normalize_inputs(make.activations(wires, 9))
    code = d.analyse(x, DeadFeatures([torch.arange(24) < 16] * 2, [16, 16], k))
    tied, other = (f.dense() for f in code.revived)
    assert [row.nonzero().flatten().tolist() for row in tied] == [[0, 1]] * 9
    assert (other > 0).sum(dim=1).max() == k


@pytest.mark.parametrize("prefixes", [None, [0.4, 1.0]])
@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_rows_of_zeros_give_finite_gradients(products, prefixes):
    """Pitfall 18: d√0."""
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, {"kind": "jumprelu", "threshold": 0.2}, products=products)
    with torch.no_grad():
        d.groups[0].W_dec.zero_()
        d.groups[1].W_dec[3].zero_()
    x = d.normalize_inputs(make.activations(wires, 9))
    code = d.analyse(x, norms=True, pre=True)
    cuts = nested.cuts(prefixes, d.sizes, Shards()) if prefixes else None
    y_hats, norms = d.decode_all([code.features], x, code.norms, cuts)
    assert len(y_hats) == len(prefixes or [1])
    terms = [losses.l1(code.features, norms), losses.tanh(code.features, norms, 4.0)]
    terms += [
        losses.preactivation(code.pre, d.gate, norms),
        *(losses.reconstruction(y_hat, 0 * d.b_dec + make.random(9, 8), None) for y_hat in y_hats),
    ]
    sum(terms).backward()
    for name, p in d.named_parameters():
        assert torch.isfinite(p.grad).all(), name
    assert d.groups[0].W_dec.grad.any()  # reconstruction brings the rows to life
