"""Each gate against its formula: forward, gradients by hand (math.md), training and inference forms."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.dictionary import make
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, encoding, wiring
from xlc_ray.dictionary.build import make_gate
from xlc_ray.dictionary.selection import Tile

EPS, THETA = 0.5, 0.8


def jumprelu(kind: str, features: int, theta: float = THETA):
    gate = make_gate(settings.JumpReluGate(threshold=theta, bandwidth=EPS, parameterisation=kind), [features], Shards())
    return gate.double()


def topk(kind="topk", sizes=(6,), k=2, norms=None, **changes):
    config = {"topk": settings.TopKGate, "batchtopk": settings.BatchTopKGate}[kind](k=k, **changes)
    return make_gate(config, list(sizes), Shards()).double()


def select(gate, pre, norms=None):
    """Masks of each group, from tiles of two tokens."""
    return list(masks(gate, dict(enumerate(pre)), norms).values())


def masks(gate, pre, norms=None):
    tokens = next(iter(pre.values())).shape[0]

    def tiles(together):
        where = [(g, first) for g in pre for first in range(0, tokens, 2)]
        for g, first in sorted(where, key=lambda place: place[1]) if together else where:
            yield Tile(g, first, tokens, lambda g=g, first=first: pre[g][first : first + 2])

    picked, _ = gate.select(tiles, norms, 1.0, [])
    found = {g: torch.zeros_like(p, dtype=torch.bool) for g, p in pre.items()}
    for g, p in picked.items():
        assert torch.equal(p.pre, pre[g].flatten()[p.entry])
        found[g].view(-1)[p.entry] = True
    return found


def kept_by_sorting(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest positive scores of each row: the definition, for scores without ties."""
    place = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (place < k) & (scores > 0)


# ---------------------------------------------------------------- ReLU, JumpReLU


def test_relu():
    gate = make_gate(settings.ReluGate(), [3], Shards())
    pre = torch.tensor([[-1.0, 0.0, 2.0]])
    mask = masks(gate, {0: pre})[0]
    assert mask.tolist() == [[False, False, True]]
    assert gate.activate(pre, 0, None).where(mask, 0).tolist() == [[0.0, 0.0, 2.0]]


@pytest.mark.parametrize("kind", ["log", "direct", "crosslayer"])
@pytest.mark.parametrize("training", [True, False])
def test_jumprelu_keeps_what_exceeds_the_threshold(kind, training):
    gate, pre = jumprelu(kind, 5).train(training), make.random(40, 5)
    f = gate.activate(pre, 0, None).where(masks(gate, {0: pre})[0], 0)
    torch.testing.assert_close(f, pre * (pre > gate.threshold(0)))
    torch.testing.assert_close(
        gate.threshold(0).detach(), torch.full((5,), THETA, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert torch.equal(gate.step(pre, 0, None) > 0, f > 0)
    assert (f >= 0).all()


@pytest.mark.parametrize("kind", ["log", "direct", "crosslayer"])
def test_jumprelu_gradients_by_hand(kind):
    gate, pre, up = jumprelu(kind, 4), make.random(200, 4).requires_grad_(), make.random(200, 4, seed=1)
    theta = gate.threshold(0).detach()
    kernel = ((pre.detach() - theta).abs() < EPS / 2).double()
    assert 0 < kernel.mean() < 1
    chain = torch.ones_like(theta) if kind == "direct" else theta  # dθ/dt = θ where θ = e^t
    numerator = pre.detach() if kind == "crosslayer" else theta
    open_, to_pre = (pre.detach() > theta).double(), 1.0 if kind == "log" else 0.0

    f = gate.activate(pre, 0, None).where(masks(gate, {0: pre.detach()})[0], 0)
    d_pre, d_raw = torch.autograd.grad((f * up).sum(), [pre, gate.raw_threshold[0]])
    torch.testing.assert_close(d_raw, chain * -(up * numerator / EPS * kernel).sum(0))
    torch.testing.assert_close(d_pre, up * (open_ + to_pre * theta / EPS * kernel))

    step = gate.step(pre, 0, None)
    wanted = [gate.raw_threshold[0]] + ([pre] if kind == "log" else [])
    d_raw, *d_pre = torch.autograd.grad((step * up).sum(), wanted, allow_unused=True)
    torch.testing.assert_close(d_raw, chain * -(up * kernel / EPS).sum(0))
    if kind == "log":
        torch.testing.assert_close(d_pre[0], up * kernel / EPS)


def test_the_direct_step_gives_pre_no_gradient():
    gate, pre = jumprelu("direct", 4), make.random(20, 4).requires_grad_()
    (d_pre,) = torch.autograd.grad(gate.step(pre, 0, None).sum(), pre, allow_unused=True)
    assert d_pre is None or not d_pre.any()


@pytest.mark.parametrize("kind", ["log", "direct"])
@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_pre_slightly_below_the_threshold_still_moves_it(kind, products):
    """Pitfall 16: a kernel applied to f instead of pre loses its lower half."""
    wires = wiring.sae(["a"], 1)
    gate = {"kind": "jumprelu", "threshold": THETA, "bandwidth": EPS, "parameterisation": kind}
    d = make.dictionary(wires, gate, features=1, products=products)
    with torch.no_grad():
        d.groups[0].W_enc.fill_(1)
        d.groups[0].b_enc.fill_(0)
        d.groups[0].W_dec.fill_(2)
        d.gate.raw_threshold[0].fill_(THETA if kind == "direct" else torch.tensor(THETA).double().log())
    x = torch.tensor([[THETA - 0.4 * EPS]], dtype=torch.float64)
    code = d.analyse(x)
    assert code.features[0].dense().tolist() == [[0.0]]
    assert code.features[0].l0().tolist() == [0]
    (3 * d.decode(code.features, x)).sum().backward()
    want = -3 * 2 * THETA / EPS * (THETA if kind == "log" else 1)
    assert d.gate.raw_threshold[0].grad.item() == pytest.approx(want)
    assert d.groups[0].W_enc.grad.item() == pytest.approx(6 * THETA / EPS * x.item() if kind == "log" else 0)
    assert d.groups[0].W_dec.grad.item() == 0
    d.eval()
    assert d.analyse(x).features[0].count().tolist() == [0]


def test_entries_named_by_feature_are_gated_as_in_the_matrix():
    gate, pre = jumprelu("log", 6), make.random(9, 6)
    with torch.no_grad():
        gate.raw_threshold[0].copy_(make.random(6, seed=2))
    every = make.support(torch.ones(9, 6).bool())
    for form in (gate.activate, gate.step):
        assert torch.equal(form(pre.flatten(), 0, every).view(9, 6), form(pre, 0, None))


def test_the_share_beyond_which_no_entries_are_listed_is_of_all_tokens():
    """A dense tile alone decides nothing; nor is one made of a group that is known to be dense."""
    gate, made = make_gate(settings.ReluGate(), [10, 10], Shards()), []
    pre = [-torch.ones(40, 10), -torch.ones(40, 10)]
    pre[0][38:] = 1.0  # 20 entries of 400: the last tile alone
    pre[1][:6] = 1.0  # 60 of 400, of which the third tile brings those above 50

    def tiles(_):
        for g, first in ((g, first) for g in (0, 1) for first in range(0, 40, 2)):
            yield Tile(g, first, 40, lambda g=g, first=first: made.append(g) or pre[g][first : first + 2])

    picked, _ = gate.select(tiles, None, 1 / 8, [])
    assert picked[0].entry.tolist() == list(range(380, 400))
    assert picked[1] is None
    assert (made.count(0), made.count(1)) == (20, 3)


# ---------------------------------------------------------------- TopK, BatchTopK


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_topk_of_each_group(k, by_norm):
    gate = topk(sizes=(8, 5), k=k, pool="group", rank_by="decoder_norm" if by_norm else "activation")
    pre = [make.random(30, 8), make.random(30, 5, seed=1)]
    norms = [make.random(8, seed=2).exp(), make.random(5, seed=3).exp()]
    scores = [p * n for p, n in zip(pre, norms, strict=True)] if by_norm else pre
    for form in (gate.train(), gate.eval()):  # exact at inference too
        for mask, s in zip(select(form, pre, norms), scores, strict=True):
            assert torch.equal(mask, kept_by_sorting(s, k))


@pytest.mark.parametrize("by_norm", [False, True])
def test_topk_over_all_groups_of_a_token(by_norm):
    gate = topk(sizes=(8, 5), k=4, pool="all", rank_by="decoder_norm" if by_norm else "activation")
    pre = [make.random(30, 8), make.random(30, 5, seed=1)]
    norms = [make.random(8, seed=2).exp(), make.random(5, seed=3).exp()]
    scores = [p * n for p, n in zip(pre, norms, strict=True)] if by_norm else pre
    assert torch.equal(torch.cat(select(gate, pre, norms), dim=1), kept_by_sorting(torch.cat(scores, dim=1), 4))


@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_batchtopk(pool, by_norm):
    gate = topk("batchtopk", (8, 5), 2, pool=pool, rank_by="decoder_norm" if by_norm else "activation")
    pre = [make.random(30, 8), make.random(30, 5, seed=1)]
    norms = [make.random(8, seed=2).exp(), make.random(5, seed=3).exp()]
    scores = [p * n for p, n in zip(pre, norms, strict=True)] if by_norm else pre
    got = select(gate, pre, norms)
    if pool == "group":
        want = [kept_by_sorting(s.reshape(1, -1), 60).view_as(s) for s in scores]
    else:
        whole = torch.cat(scores, dim=1)
        want = kept_by_sorting(whole.reshape(1, -1), 60).view_as(whole).split((8, 5), dim=1)
    for mask, w in zip(got, want, strict=True):
        assert torch.equal(mask, w)
    assert not torch.equal(got[0].sum(1), torch.full((30,), 2))  # places do move between tokens


@pytest.mark.parametrize("pool", ["group", "all"])
def test_ties_keep_exactly_k(pool):
    """Pitfall 20."""
    rows = torch.cat([torch.full((4, 6), 0.5), torch.tensor([[3.0, 1, 1, 1, 0, -1]]).repeat(4, 1)]).double()
    pre = [rows, rows.clone()]
    masks = select(topk(sizes=(6, 6), k=3, pool=pool), pre)
    if pool == "group":
        assert all((m.sum(dim=1) == 3).all() for m in masks)
        assert all(m[4:, 0].all() for m in masks)
    else:
        assert ((masks[0].sum(dim=1) + masks[1].sum(dim=1)) == 3).all()
    batch = select(topk("batchtopk", (6, 6), 3, pool=pool), pre)
    if pool == "group":
        assert [int(m.sum()) for m in batch] == [24, 24]
    else:
        assert int(batch[0].sum() + batch[1].sum()) == 24
    assert all(m[4:, 0].all() for m in batch)  # 3.0 is above every tie


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("pool", ["group", "all"])
def test_places_without_a_positive_value_stay_empty(kind, pool):
    pre = [-make.random(6, 5).abs(), make.random(6, 5, seed=1)]
    pre[0][2, 3], pre[1][0] = 0.0, -1.0
    masks = select(topk(kind, (5, 5), 5, pool=pool), pre)
    assert not masks[0].any()
    assert torch.equal(masks[1], pre[1] > 0)


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_features_are_the_selected_preactivations(kind, products):
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, {"kind": kind, "k": 3}, products=products)
    x = d.normalize_inputs(make.activations(wires, 12))
    for training in (True, False):
        code = d.train(training).analyse(x, pre=True)
        for f, pre in zip(code.features, code.pre, strict=True):
            dense = f.dense()
            assert (dense >= 0).all()
            assert torch.allclose(dense, pre.where(dense != 0, 0), rtol=1e-12)
        if training:
            l0 = sum(f.l0() for f in code.features)
            assert (int(l0.sum()) == 36) if kind == "batchtopk" else (l0 == 3).all()


@pytest.mark.parametrize("products", ["dense", "auto", "sparse"])
@pytest.mark.parametrize(
    "gate", [{"kind": "jumprelu"}, {"kind": "topk", "k": 1}, {"kind": "topk", "k": 1, "rank_by": "zscore"}], ids=str
)
def test_all_pre_activations_are_made_once_where_they_are_asked_for(gate, products, monkeypatch):
    """2 B R F FLOPs a group; and what is selected of them in tiles is selected without asking."""
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, gate, products=products)
    x = d.normalize_inputs(make.activations(wires, 12))
    monkeypatch.setattr(encoding, "TILE", 35)
    with FlopCounterMode(display=False) as counter:
        code = d.analyse(x, pre=True)
    assert counter.get_total_flops() == 2 * 2 * 12 * 4 * 7
    for f, other in zip(code.features, d.analyse(x).features, strict=True):
        torch.testing.assert_close(f.dense(), other.dense(), rtol=1e-12, atol=1e-12)
        assert (f.support is None) == (other.support is None)


# ---------------------------------------------------------------- inference thresholds


def test_the_inference_threshold_is_a_running_mean_from_its_start():
    gate = topk("batchtopk", (4,), 1, threshold_start=2, threshold_decay=0.75)
    smallest = [0.5, 3.0, 1.0, 2.0]
    found = []
    for step, value in enumerate(smallest, start=1):
        pre = torch.tensor([[9.0, -1, 0, 0.1], [value, -2, 0.2, -9]]).double()  # k·B = 2 places
        select(gate, [pre])
        gate.finish_step(step)
        found.append(gate.inference_threshold.item())
    third = 0.75 * 3.0 + 0.25 * 1.0
    assert found == pytest.approx([0.5, 3.0, third, 0.75 * third + 0.25 * 2.0])


def test_each_pool_has_its_own_threshold_and_inference_is_strictly_above_it():
    gate = topk("batchtopk", (3, 3), 1, pool="group", threshold_start=0, threshold_decay=0.0)
    pre = [torch.tensor([[4.0, 1, 2]]).double(), torch.tensor([[0.25, -1, 0.1]]).double()]
    select(gate, pre)
    gate.finish_step(1)
    assert gate.inference_threshold.tolist() == [4.0, 0.25]
    gate.eval()
    seen = torch.tensor([[4.0, 4.5, 0.3]]).double()
    found = masks(gate, {0: seen, 1: seen})
    assert found[0].tolist() == [[False, True, False]]
    assert found[1].tolist() == [[True, True, True]]
    assert masks(gate, {1: seen})[1].tolist() == [[True, True, True]]  # a group alone


def test_a_budget_over_groups_averages_the_smallest_kept_of_each_token():
    gate = topk(sizes=(2, 2), k=2, pool="all", threshold_start=0, threshold_decay=0.5)
    pre = [torch.tensor([[5.0, 1], [-1, -1], [-1, -1]]).double(), torch.tensor([[3.0, 2], [7.0, -1], [-1, 0]]).double()]
    select(gate, pre)
    gate.finish_step(1)  # 3 and 7; the last token keeps nothing and says nothing
    assert gate.inference_threshold.tolist() == [0.5 * 5.0]


def test_thresholds_compare_scores_when_ranking_by_norm():
    gate = topk("batchtopk", (2,), 1, rank_by="decoder_norm", threshold_start=0, threshold_decay=0.0)
    norms = [torch.tensor([10.0, 1.0]).double()]
    found = select(gate, [torch.tensor([[1.0, 2.0]]).double()], norms)
    assert found[0].tolist() == [[True, False]]
    gate.finish_step(1)
    assert gate.inference_threshold.tolist() == [10.0]
    found = masks(gate.eval(), {0: torch.tensor([[1.5, 9.0]]).double()}, norms)
    assert found[0].tolist() == [[True, False]]


def test_inference_in_eval_form_does_not_move_the_threshold():
    wires = wiring.sae(["a"], 4)
    d = make.dictionary(wires, {"kind": "batchtopk", "k": 2, "threshold_start": 0})
    x = make.random(10, 4)
    d.analyse(x)
    d.gate.finish_step(1)
    before = d.gate.inference_threshold.clone(), d.gate.smallest_kept.clone()
    assert before[0] > 0
    one = d.eval().encode(x)[0].dense()
    assert torch.equal(d.gate.inference_threshold, before[0])
    assert torch.equal(d.gate.smallest_kept, before[1])
    alone = torch.cat([d.encode(row.unsqueeze(0))[0].dense() for row in x])  # a token does not see the others
    torch.testing.assert_close(alone, one)
