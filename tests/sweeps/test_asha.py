"""Successive halving: where rungs are, and who goes on."""

from __future__ import annotations

import math

import pytest

from xlc_ray.config.sweep import Asha
from xlc_ray.sweeps.asha import Halving, rungs


def metrics(l0, fvu):
    return {"l0": l0, "fvu": fvu}


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
    on = [halving.goes_on(f"t{v}", 10, {"fvu": v}) for v in came]
    # The n-th goes on with fewer than n / 3 better ones: none of 1 to 3, at most one of 4 to 6, at most two of 7 to 9.
    assert on == [True, True, False, True, True, False, False, False, True]


def test_halving_decides_at_rungs_and_only_once():
    halving = Halving((10,), 2, "fvu")
    assert halving.goes_on("a", 7, {"fvu": 1.0})
    assert halving.goes_on("a", 10, {"fvu": 1.0})
    assert not halving.goes_on("b", 10, {"fvu": 2.0})
    assert halving.goes_on("c", 10, {"fvu": 0.5})
    assert halving.goes_on("a", 10, {"fvu": 1.0}), "a restarted trial is told the same"
    assert not halving.goes_on("d", 10, {"fvu": math.nan})


def test_halving_keeps_the_whole_frontier_and_cuts_what_is_behind():
    halving = Halving((10,), 2, "frontier")
    curve = {8: 0.4, 32: 0.2, 128: 0.1}
    for l0, fvu in curve.items():
        assert halving.goes_on(f"good{l0}", 10, metrics(l0, fvu))
    assert [halving.goes_on(f"bad{l0}", 10, metrics(l0, 1.3 * fvu)) for l0, fvu in curve.items()] == [False] * 3
    assert [halving.goes_on(f"new{l0}", 10, metrics(l0, 0.97 * fvu)) for l0, fvu in curve.items()] == [True] * 3
