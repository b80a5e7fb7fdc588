"""The frontier and the excess over it, against brute force and by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlc_ray.sweeps.asha import Halving
from xlc_ray.sweeps.frontier import cost, excesses, frontier, pareto, points_of, scores
from xlc_ray.sweeps.pbt import Population

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def metrics(l0, fvu):
    return {"l0": l0, "fvu": fvu}


@given(points)
def test_pareto_is_what_no_other_equals_or_beats(found):
    front = pareto(found)
    for i, (x, y) in enumerate(found):
        beaten = any(a <= x and b <= y and ((a, b) != (x, y) or j < i) for j, (a, b) in enumerate(found) if j != i)
        assert (i in front) == (not beaten)
    assert [found[i][0] for i in front] == sorted(found[i][0] for i in front)


def test_excess_is_fvu_at_matched_l0():
    front = [(16, 0.4), (64, 0.2)]
    found = excesses([*front, (16, 0.44), (32, 0.4), (256, 0.2), (256, 0.3), (65, math.nan), (math.inf, 0.1)])
    assert found[:2] == [0, 0]
    assert found[2] == pytest.approx(math.log(1.1))
    # Between two points: the straight line in logarithms, 0.4 / sqrt 2 at l0 = 32. Beyond the last: as at the last.
    assert found[3] == pytest.approx(math.log(math.sqrt(2)))
    assert found[4:] == [0, pytest.approx(math.log(1.5)), math.inf, math.inf]


@given(points)
def test_none_is_behind_itself_and_the_frontier_is_never_behind(found):
    behind = excesses([(x + 1, y + 1) for x, y in found])
    assert min(behind) >= 0
    assert all(behind[i] == 0 for i in frontier([(x + 1, y + 1) for x, y in found]))


@given(points)
def test_the_frontier_leaves_out_only_what_is_clearly_behind_at_nearly_the_same_l0(found):
    found = [(x + 20, y + 1) for x, y in found]  # whole numbers from 20 on: one apart is 5 % or less
    front, kept = pareto(found), frontier(found)
    assert set(kept) <= set(front)
    assert front[-1:] == kept[-1:], "the least fvu stays"
    for i in front:
        near = [b for a, b in found if found[i][0] < a <= 1.05 * found[i][0]]
        assert (i in kept) == (min(near, default=math.inf) >= 0.9 * found[i][1])


def test_a_trial_far_behind_is_not_saved_by_a_hair_less_l0():
    found = [(8.1, 0.265), (7.9, 0.372), (16, 0.21), (7.8, 0.28)]
    assert pareto(found[:3]) == [1, 0, 2]
    assert frontier(found[:3]) == [0, 2]
    assert excesses(found[:3]) == [0, pytest.approx(math.log(0.372 / 0.265)), 0]
    assert frontier(found) == [3, 0, 2], "6 % less fvu may be worth 4 % more features"


@given(st.floats(0.2, 0.8), st.floats(1.01, 3), st.lists(st.integers(1, 500), min_size=2, max_size=8, unique=True))
def test_trials_are_judged_alike_wherever_they_lie(slope, factor, l0s):
    """No sparsity is preferred: the same share more fvu than the curve is the same excess everywhere."""
    curve = {str(l0): metrics(l0, 0.3 * l0**-slope) for l0 in l0s}
    for found in curve.values():
        behind = scores("frontier", curve | {"new": metrics(found["l0"], factor * found["fvu"])})
        assert behind.pop("new") == pytest.approx(math.log(factor))
        assert set(behind.values()) == {0}


def test_who_explains_nothing_is_behind_all_who_do_however_sparse():
    found = {"collapsed": metrics(0.0, 1.0), "good": metrics(16, 0.4), "worse": metrics(16, 0.5)}
    assert scores("frontier", found) == {
        "collapsed": math.inf,
        "good": 0,
        "worse": pytest.approx(math.log(1.25)),
    }
    halving = Halving((10,), 2, "frontier")
    assert halving.go_on(10, found) == {"collapsed": False, "good": True, "worse": True}
    assert set(Halving((10,), 2, "frontier").go_on(10, dict.fromkeys("abc", metrics(0, 1.1))).values()) == {True}
    moves = Population(list(found), 1, "frontier", 0, lambda settings, rng: settings).decide(
        10, found, {name: {} for name in found}
    )
    assert {name: move.source for name, move in moves.items()} == {"collapsed": "good"}
    assert pareto(points_of("l0", "fvu", found.values())) == [1]
    assert pareto(points_of("l0", "kl", [{"l0": 1, "kl": 3.0}])) == [0]


def test_other_metrics_count_as_they_are_with_their_direction():
    found = {"a": {"fvu": 0.1, "explained_variance": 0.9}, "b": {"fvu": 0.2, "explained_variance": None}}
    assert scores("fvu", found) == {"a": 0.1, "b": 0.2}
    assert scores("explained_variance", found) == {"a": -0.9, "b": math.inf}


@pytest.mark.parametrize("name", ["l2_ratio", "relative_reconstruction_bias"])
def test_ratios_are_best_at_one_and_twice_is_as_far_as_half(name):
    costs = [cost(name, {name: value}) for value in (1.0, 0.5, 2.0, 1.1, 0.0, -1.0)]
    assert costs == [0, math.log(2), math.log(2), pytest.approx(math.log(1.1)), math.inf, math.inf]
