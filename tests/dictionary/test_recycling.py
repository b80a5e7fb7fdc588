"""The memory of a step's gradients serves the next step, and never shows: gradients are those of fresh memory."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.dictionary import wiring
from xlc_ray.dictionary.kernels.combine import combine, combine_into
from xlc_ray.dictionary.recycling import forget_gradients

SITES = wiring.clt([0, 1], 5)


def backward(dictionary, batch, decodes: int = 1) -> None:
    x, y = dictionary.normalize_inputs(batch), dictionary.normalize_targets(batch)
    features = dictionary.encode(x)
    for y_hat in dictionary.decode_all([features] * decodes, x)[0]:
        (y_hat - y).square().sum().backward(retain_graph=True)


def gradients(dictionary) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in dictionary.named_parameters()}


@pytest.fixture
def dictionary():
    return make.dictionary(SITES, {"kind": "topk", "k": 3}, products="sparse")


@pytest.mark.parametrize("decodes", [1, 2], ids=["decoded once", "decoded twice"])
def test_recycled_gradients_equal_fresh_ones(dictionary, decodes):
    batches = [make.activations(SITES, 6, seed) for seed in range(3)]
    fresh = []
    for batch in batches:
        dictionary.zero_grad(set_to_none=True)
        backward(dictionary, batch, decodes)
        fresh.append(gradients(dictionary))
    for batch, want in zip(batches, fresh, strict=True):
        forget_gradients(dictionary.parameters())
        backward(dictionary, batch, decodes)
        for name, got in gradients(dictionary).items():
            torch.testing.assert_close(got, want[name], rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # what the memory holds must not matter
            for p in dictionary.parameters():
                p.grad.fill_(torch.nan)


def test_the_same_memory_serves_every_step(dictionary):
    places = []
    for seed in range(3):
        forget_gradients(dictionary.parameters())
        backward(dictionary, make.activations(SITES, 6, seed))
        places.append([g.W_dec.grad.data_ptr() for g in dictionary.groups])
    assert places[0] == places[1] == places[2]


def test_gradients_of_several_backwards_add_up(dictionary):
    first, second = (make.activations(SITES, 6, seed) for seed in (0, 1))
    for _ in range(2):
        forget_gradients(dictionary.parameters())
        backward(dictionary, first)
        backward(dictionary, second)
        both = gradients(dictionary)
    dictionary.zero_grad(set_to_none=True)
    backward(dictionary, first)
    backward(dictionary, second)
    for name, want in gradients(dictionary).items():
        torch.testing.assert_close(both[name], want, rtol=1e-12, atol=1e-12)


def test_gradients_of_dense_products_are_not_kept():
    dictionary = make.dictionary(SITES, products="dense")
    for _ in range(2):
        forget_gradients(dictionary.parameters())
        backward(dictionary, make.activations(SITES, 6))
    forget_gradients(dictionary.parameters())
    assert all(p.grad is None for p in dictionary.parameters())
    assert all(p.spare is None for p in dictionary.parameters())


@pytest.mark.parametrize("pulled", [False, True], ids=["sums", "sums and weights"])
@pytest.mark.parametrize("mkl", [True, False], ids=["MKL", "no MKL"])
@pytest.mark.parametrize("empty", [False, True], ids=["some entries", "none"])
def test_writing_into_memory_equals_combine(mkl, empty, pulled, monkeypatch):
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    mask = torch.zeros(4, 3, dtype=torch.bool) if empty else torch.rand(4, 3, generator=make.generator()) < 0.5
    support = make.support(mask)
    _, starts, token = support.by_feature
    wide = make.random(4, 9)
    args = (starts, token, make.random(token.numel()), wide[:, 2:7])
    out = torch.full((3, 5), torch.nan, dtype=torch.float64)
    pull, base = (make.random(3, seed=5), make.random(5, 3, seed=6).T) if pulled else (None, None)
    combine_into(out, *args, pull, base)
    want = combine(*args) + (pull.unsqueeze(1) * base if pulled else 0)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(combine_into, (torch.zeros_like(out), *args, pull, base))
