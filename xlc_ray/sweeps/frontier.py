"""Sparsity against fidelity: which trials no other beats, and how far the rest lie behind.

The *frontier* of points (l0, fvu) are those that no other point equals or beats in both. Between its points it is read
off a straight line in (log l0, log fvu); beyond its ends, where nothing was measured, it goes on as

    fvu ∝ l0^-⅓, at most 1

which is about how fvu falls with l0 (0.30 in the quickstart's sweep). A trial's *excess* is fvu at matched l0:

    excess = log fvu - log (the fvu of the others' frontier at the trial's l0)

below 0 where the trial extends the frontier, log 1.1 where its fvu is 10 % more than that of the others at its l0. It
compares sparse trials with sparse ones and dense with dense ones, so that cutting by it leaves none of either out.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence

Metrics = Mapping[str, float | None]
Point = tuple[float, float]
SLOPE = 1 / 3
HIGHER_IS_BETTER = ("explained_variance", "cosine_similarity", "l2_ratio", "ce_recovered", "top1_agreement")
SMALL = 1e-9


def cost(name: str, metrics: Metrics) -> float:
    """A metric as something to make small; infinite where it has no finite value."""
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if name in HIGHER_IS_BETTER else value


def pareto(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other equals or beats in both coordinates, by rising x. Of equals, the first."""
    found, least = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < least and math.isfinite(points[i][0]):
            found.append(i)
            least = points[i][1]
    return found


def frontier_at(points: Sequence[Point], l0: float) -> float:
    """log fvu of the frontier of some points (at least one) at an l0."""
    line = [(math.log(max(x, SMALL)), math.log(max(y, SMALL))) for x, y in (points[i] for i in pareto(points))]
    x = math.log(max(l0, SMALL))
    (left, first), (right, last) = line[0], line[-1]
    if x <= left:
        return max(min(first + SLOPE * (left - x), 0.0), first)
    if x >= right:
        return last - SLOPE * (x - right)
    i = bisect.bisect_right([at for at, _ in line], x)
    return interpolate(line[i - 1], line[i], x)


def interpolate(one: Point, other: Point, x: float) -> float:
    """The line through two points at x."""
    share = (x - one[0]) / (other[0] - one[0])
    return one[1] + share * (other[1] - one[1])


def excess(mine: Metrics, others: Iterable[Metrics]) -> float:
    """log fvu above the frontier of others at my l0; 0 without others, infinite where my numbers are not finite."""
    l0, fvu = cost("l0", mine), cost("fvu", mine)
    if not (math.isfinite(l0) and math.isfinite(fvu)):
        return math.inf
    points = [(cost("l0", m), cost("fvu", m)) for m in others]
    points = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    return math.log(max(fvu, SMALL)) - frontier_at(points, l0) if points else 0.0


def scores(metric: str, measured: Mapping[str, Metrics]) -> dict[str, float]:
    """{trial: what to make small}: its excess over the others if `metric` is frontier, else the metric itself."""
    if metric != "frontier":
        return {name: cost(metric, found) for name, found in measured.items()}
    return {
        name: excess(found, (other for at, other in measured.items() if at != name)) for name, found in measured.items()
    }
