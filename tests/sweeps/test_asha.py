"""Successive halving: where rungs are, and who goes on."""

from __future__ import annotations

import math

import pytest

from xlc_ray.config.sweep import Asha
from xlc_ray.sweeps.asha import Halving, rungs


def metrics(l0, fvu):
    return {"l0": l0, "fvu": fvu}


def goes_on(halving, trial, step, found):
    return halving.go_on(step, {trial: found})[trial]


@pytest.mark.parametrize(
    ("asha", "last", "wanted"),
    [
        ({"grace": 10}, 300, (10, 30, 90, 270)),
        ({"grace": 10}, 90, (10, 30)),
        ({"grace": 10}, 10, ()),
        ({"grace": 3, "reduction": 1.5}, 12, (3, 4, 7, 10)),
        ({"grace": 5, "rungs": [5, 50, 500]}, 100, (5, 50)),
    ],
)
def test_rungs_are_below_the_last_step(asha, last, wanted):
    assert rungs(Asha(**asha), last) == wanted
    assert rungs(None, last) == ()


def test_halving_keeps_the_best_share_of_those_that_came():
    halving = Halving((10,), 3, "fvu")
    came = [5, 1, 4, 3, 2, 9, 8, 7, 0]
    on = [goes_on(halving, f"t{v}", 10, {"fvu": v}) for v in came]
    # The n-th goes on with fewer than n / 3 better ones: none of 1 to 3, at most one of 4 to 6, at most two of 7 to 9.
    assert on == [True, True, False, True, True, False, False, False, True]


def test_halving_decides_at_rungs_and_only_once():
    halving = Halving((10,), 2, "fvu")
    assert goes_on(halving, "a", 7, {"fvu": 1.0})
    assert goes_on(halving, "a", 10, {"fvu": 1.0})
    assert not goes_on(halving, "b", 10, {"fvu": 2.0})
    assert goes_on(halving, "c", 10, {"fvu": 0.5})
    assert goes_on(halving, "a", 10, {"fvu": 1.0}), "a restarted trial is told the same"
    assert not goes_on(halving, "d", 10, {"fvu": math.nan})


def test_halving_keeps_the_whole_frontier_and_cuts_what_is_behind():
    halving = Halving((10,), 2, "frontier")
    curve = {8: 0.4, 32: 0.2, 128: 0.1}
    for l0, fvu in curve.items():
        assert goes_on(halving, f"good{l0}", 10, metrics(l0, fvu))
    assert [goes_on(halving, f"bad{l0}", 10, metrics(l0, 1.3 * fvu)) for l0, fvu in curve.items()] == [False] * 3
    assert [goes_on(halving, f"new{l0}", 10, metrics(l0, 0.97 * fvu)) for l0, fvu in curve.items()] == [True] * 3


def test_trials_that_come_together_are_compared_with_all_of_them():
    halving = Halving((10,), 2, "fvu")
    assert halving.go_on(10, {"a": {"fvu": 3.0}, "b": {"fvu": 1.0}, "c": {"fvu": 2.0}, "d": {"fvu": 4.0}}) == {
        "a": False,
        "b": True,
        "c": True,
        "d": False,
    }
    assert halving.go_on(7, {"a": {"fvu": 3.0}}) == {"a": True}
