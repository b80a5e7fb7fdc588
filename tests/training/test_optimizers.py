"""Adam with 8-bit moments: the same steps where nothing is quantised, close ones where it is, in less memory."""

import sys

import pytest
import torch

from xlc_ray.config import UserError
from xlc_ray.config.training import Train
from xlc_ray.training import optimizers


def settings(**optimizer) -> Train:
    return Train(steps=1, batch_tokens=1, lr=0.1, optimizer=optimizer)


def trained(train: Train, shape: tuple[int, ...], shrink: float | None, steps: int = 4):
    draw = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=draw))
    optimizer = optimizers.make(train, [p])
    for i in range(steps):
        p.grad = torch.randn(shape, generator=draw)
        optimizers.step(optimizer, 0.01 * (i + 1), [p.grad], shrink)
    return p, optimizer


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("shrink", [None, 7.0])
def test_both_take_the_same_steps(kind, shrink):
    """Small tensors are not quantised, so that only the arithmetic's order may differ."""
    options = {"kind": kind, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
    one, _ = trained(settings(**options), (8, 8), shrink)
    other, _ = trained(settings(**options, states="int8"), (8, 8), shrink)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_and_the_clipping_count():
    p, _ = trained(settings(states="int8", eps=1.0), (8, 8), None)
    clipped, _ = trained(settings(states="int8", eps=1.0), (8, 8), 7.0)
    assert not torch.allclose(p, clipped)


def test_moments_take_a_quarter_and_stay_close():
    exact, plain = trained(settings(), (64, 256), None)
    p, optimizer = trained(settings(states="int8"), (64, 256), None)
    for key in optimizers.MOMENTS:
        held = optimizer.state[p][key]
        size = held.codes.nbytes + held.scale.nbytes
        assert size < plain.state[exact][key].nbytes / 3.9
    start = trained(settings(), (64, 256), None, steps=0)[0]
    assert (p - exact).norm() < 0.05 * (exact - start).norm()


def test_what_is_taken_back_is_what_was_given():
    p, optimizer = trained(settings(states="int8"), (64, 256), None)
    given = optimizers.moments(optimizer, p)
    assert all(type(value) is torch.Tensor for value in given.values())
    fresh = torch.nn.Parameter(p.detach().clone())
    again = optimizers.make(settings(states="int8"), [fresh])
    before = optimizers.moments(again, fresh)
    assert not any(before[key].any() for key in optimizers.MOMENTS)
    for q, o in ((p, optimizer), (fresh, again)):  # saving, and resuming from it
        optimizers.put(o, q, given)
    for key in optimizers.MOMENTS:
        assert torch.equal(optimizer.state[p][key].codes, again.state[fresh][key].codes)
        assert torch.equal(optimizer.state[p][key].scale, again.state[fresh][key].scale)


def test_without_torchao_the_setting_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"train\.optimizer\.states: int8 needs the package torchao"):
        optimizers.make(settings(states="int8"), [torch.nn.Parameter(torch.zeros(1))])
