"""The frontier and the excess over it, against brute force and by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlc_ray.sweeps.frontier import excess, pareto, scores

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
    others = [metrics(16, 0.4), metrics(64, 0.2), metrics(70, 0.5)]  # the last is beaten and plays no part
    assert excess(metrics(16, 0.44), others) == pytest.approx(math.log(1.1))
    # Between two points: the straight line in logarithms, 0.4 / sqrt 2 at l0 = 32.
    assert excess(metrics(32, 0.2), others) == pytest.approx(math.log(0.2 / (0.4 / math.sqrt(2))))
    # Beyond the ends: a cube root, which never predicts more than nothing explained.
    assert excess(metrics(512, 0.2), others) == pytest.approx(math.log(2))
    assert excess(metrics(2, 0.4), others) == pytest.approx(math.log(0.5))
    assert excess(metrics(0.001, 0.9), others) == pytest.approx(math.log(0.9))


def test_excess_without_others_or_without_numbers():
    assert excess(metrics(3, 0.5), []) == 0
    assert excess(metrics(math.nan, 0.5), [metrics(3, 0.5)]) == math.inf
    assert excess({"l0": 3, "fvu": None}, [metrics(3, 0.5)]) == math.inf
    assert excess(metrics(3, 0.5), [metrics(math.nan, 0.1)]) == 0


@given(st.floats(0.2, 0.8), st.lists(st.floats(1, 500), min_size=2, max_size=8, unique=True))
def test_trials_on_one_curve_are_judged_alike_wherever_they_lie(slope, l0s):
    """No sparsity is preferred: the fate of a trial depends on what others reach at its own l0."""
    curve = {str(l0): metrics(l0, 0.9 * (l0 + 1) ** -slope) for l0 in l0s}
    for found in curve.values():
        worse = curve | {"new": metrics(found["l0"], 1.2 * found["fvu"])}
        assert scores("frontier", worse)["new"] == pytest.approx(math.log(1.2))


def test_other_metrics_count_as_they_are_with_their_direction():
    found = {"a": {"fvu": 0.1, "explained_variance": 0.9}, "b": {"fvu": 0.2, "explained_variance": None}}
    assert scores("fvu", found) == {"a": 0.1, "b": 0.2}
    assert scores("explained_variance", found) == {"a": -0.9, "b": math.inf}
