"""Sparse products equal dense ones, in value and gradient, for any support; both forms of Features agree."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dictionary import make
from xlc_ray.dictionary import Features, sparse
from xlc_ray.dictionary.kernels import HAS_TRITON


@st.composite
def masks(draw):
    tokens, features = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    entries = draw(st.lists(st.booleans(), min_size=tokens * features, max_size=tokens * features))
    return torch.tensor(entries).view(tokens, features)


NONE = torch.zeros(4, 3, dtype=torch.bool)
GAPS = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)  # empty rows, a full one
EVERYTHING = torch.ones(4, 3, dtype=torch.bool)


def check(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(masks(), st.integers(1, 5))
@example(NONE, 2)
@example(GAPS, 2)
@example(EVERYTHING, 1)
@example(torch.tensor([[True]]), 1)
def test_decode_equals_dense(mask, width):
    support, values = make.support(mask), make.random(int(mask.sum()))
    weights, up = make.random(mask.shape[1], width, seed=1), make.random(mask.shape[0], width, seed=2)
    values.requires_grad_()
    weights.requires_grad_()
    norms = weights.norm(dim=1)
    want, pull = support.dense(values) @ weights, make.random(mask.shape[1], seed=3)
    inputs = [values, weights]
    alone, none = sparse.decode(values, support, weights)
    got, same = sparse.decode(values, support, weights, norms.detach())
    check([alone, got, same], [want, want, norms])
    assert none is None
    wanted = torch.autograd.grad((want * up).sum(), inputs, retain_graph=True)
    check(torch.autograd.grad((alone * up).sum(), inputs), wanted)
    check(torch.autograd.grad((got * up).sum(), inputs, retain_graph=True), wanted)
    wanted = torch.autograd.grad((want * up).sum() + (norms * pull).sum(), inputs)
    check(torch.autograd.grad((got * up).sum() + (same * pull).sum(), inputs), wanted)


@settings(deadline=None, max_examples=40)
@given(masks(), st.integers(1, 5))
@example(NONE, 2)
@example(GAPS, 2)
@example(EVERYTHING, 1)
@example(torch.tensor([[True]]), 1)
def test_encode_at_equals_dense(mask, width):
    support, x = make.support(mask), make.random(mask.shape[0], width)
    weights, bias = make.random(mask.shape[1], width, seed=1).requires_grad_(), make.random(mask.shape[1], seed=2)
    bias.requires_grad_()
    dense = x @ weights.T + bias
    got = sparse.encode_at(x, weights, bias, support, dense.detach()[mask])
    want, up = dense[mask], make.random(int(mask.sum()), seed=3)
    check([got], [want])
    inputs = [weights, bias]
    check(torch.autograd.grad((got * up).sum(), inputs), torch.autograd.grad((want * up).sum(), inputs))


@pytest.mark.parametrize("mask", [GAPS, EVERYTHING, NONE], ids=["gaps", "everything", "none"])
def test_gradcheck(mask):
    support, x = make.support(mask), make.random(mask.shape[0], 2)
    values, weights = make.random(int(mask.sum())).requires_grad_(), make.random(mask.shape[1], 2).requires_grad_()
    bias = make.random(mask.shape[1], seed=4).requires_grad_()

    def encode(w, b):
        return sparse.encode_at(x, w, b, support, (x @ w.T + b).detach()[mask])

    assert torch.autograd.gradcheck(lambda v, w: sparse.decode(v, support, w)[0], (values, weights))
    norms = weights.detach().norm(dim=1)
    assert torch.autograd.gradcheck(lambda v, w: sparse.decode(v, support, w, norms)[0], (values, weights))
    assert torch.autograd.gradcheck(encode, (weights, bias))
    assert torch.autograd.gradcheck(support.dense, (values,))


@settings(deadline=None, max_examples=30)
@given(masks())
@example(NONE)
@example(GAPS)
def test_orders_of_a_support(mask):
    support, values = make.support(mask), make.random(int(mask.sum()))
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = values
    check([support.dense(values)], [dense])
    assert torch.equal(torch.stack([support.token, support.feature], 1), mask.nonzero())
    assert torch.equal(support.by_token.diff(), mask.sum(1))
    order, starts, token = support.by_feature
    assert torch.equal(torch.stack([support.feature[order], token], 1), mask.T.nonzero())
    assert torch.equal(starts.diff(), mask.sum(0))
    assert support.by_token[0] == starts[0] == 0


def test_without_gradients_nothing_is_sorted():
    support, weights = make.support(GAPS), make.random(3, 2).requires_grad_()
    values = make.random(int(GAPS.sum()))
    with torch.no_grad():
        sparse.decode(values, support, weights)
        sparse.encode_at(make.random(4, 2), weights, weights[:, 0], support, values)
    assert "by_feature" not in vars(support)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("up", ["columns", "one number", "transposed"])
def test_any_precision_and_layout_of_gradients(dtype, up):
    mask = make.random(40, 30, seed=5) > 0.8
    support, exact = make.support(mask), torch.float64
    values, weights = make.random(int(mask.sum())).to(dtype), make.random(30, 25, seed=1).to(dtype)
    grad = make.random(40, 70, seed=2).to(dtype)
    grad = {"columns": grad[:, 20:45], "one number": grad[0, 0].expand(40, 25), "transposed": grad.T[:40, :25]}[up]
    values.requires_grad_()
    weights.requires_grad_()
    out, _ = sparse.decode(values, support, weights)
    got = [out, *torch.autograd.grad(out, [values, weights], grad)]
    dense, weights, grad = support.dense(values.detach()).to(exact), weights.detach().to(exact), grad.to(exact)
    for a, b in zip(got, [dense @ weights, (grad @ weights.T)[mask], dense.T @ grad], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


def test_autocast_does_not_reach_the_products():
    values, weights = make.random(int(GAPS.sum())).float(), make.random(3, 2).float().requires_grad_()
    support = make.support(GAPS)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = sparse.decode(values, support, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, support.dense(values) @ weights)


@settings(deadline=None, max_examples=30)
@given(masks())
@example(NONE)
@example(GAPS)
def test_both_forms_of_features_agree(mask):
    pre = make.random(*mask.shape)
    values = pre.clamp(min=0).where(mask, 0)  # zeros within the support, as JumpReLU's margin has them
    support, norms = make.support(mask), make.random(mask.shape[1], seed=1).abs()
    dense, thin = Features(values, pre), Features(values[mask], pre[mask], support)
    assert dense.shape == thin.shape == tuple(mask.shape)
    assert torch.equal(thin.dense(), values)
    active = (values != 0).long()
    for f in (dense, thin):
        assert torch.equal(f.l0(), active.sum(1))
        assert torch.equal(f.count(), active.sum(0))
        assert f.count().dtype == f.l0().dtype == torch.int64
    want = (values**2 * norms).sum()
    check([f.total(lambda v, _, n: v**2 * n, norms) for f in (dense, thin)], [want, want])
    weights = make.random(mask.shape[1], 3, seed=2)
    check(thin.decode(weights)[:1], dense.decode(weights)[:1])


def test_sparse_products_are_chosen_for_few_entries_only():
    cpu = torch.device("cpu")
    assert not sparse.sparse_pays("auto", 13, 100, cpu)
    assert sparse.sparse_pays("auto", 12, 100, cpu)
    assert sparse.sparse_pays("auto", 12, 100, torch.device("cuda")) == HAS_TRITON
    assert sparse.sparse_pays("sparse", 100, 100, cpu)
    assert not sparse.sparse_pays("dense", 0, 100, cpu)
