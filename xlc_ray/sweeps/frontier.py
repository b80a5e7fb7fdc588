"""Sparsity against fidelity: which trials no other beats, and how far the rest lie behind.

Of points (l0, fvu) those are not dominated that no other equals or beats in both. Measured l0 differ by a few per cent
between trials of the same k, so that a trial far behind another would often be so by being a little sparser. The
*frontier* therefore leaves out a point where another, with at most NEAR more l0, has less than 1 − CLEAR of its fvu.
Between its points it is read off a straight line in (log l0, log fvu); beyond its last, more features are taken to give
nothing more. The *excess* of a trial is fvu at matched l0,

    excess = log fvu - log (the frontier's fvu at the trial's l0)

which is 0 on the frontier, and log 1.1 where the trial's fvu is 10 % more than the frontier's at the same l0. Nothing
in it says how much l0 an fvu is worth: a sparse trial is behind only if others do better at its own sparsity. But who
explains nothing (fvu ≥ 1, as a dictionary without active features) is behind everyone, being sparser than all for that.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

Metrics = Mapping[str, float | None]
Point = tuple[float, float]
HIGHER_IS_BETTER = ("explained_variance", "cosine_similarity", "ce_recovered", "top1_agreement")
ONE_IS_BEST = ("l2_ratio", "relative_reconstruction_bias")
SMALL = 1e-9
NEAR = 0.05
CLEAR = 0.1
"""What 5 % of the features are worth is much less than 10 % of fvu."""


def cost(name: str, metrics: Metrics) -> float:
    """A metric as something to make small, |log| of ratios that should be 1; infinite where it has no finite value."""
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        return math.inf
    if name in ONE_IS_BEST:
        return abs(math.log(value)) if value > 0 else math.inf
    return -value if name in HIGHER_IS_BETTER else value


def is_error(name: str) -> bool:
    """Whether a metric is the better the smaller it is."""
    return name not in (*HIGHER_IS_BETTER, *ONE_IS_BEST)


def points_of(x: str, y: str, measured: Iterable[Metrics]) -> list[Point]:
    """What each has measured of two metrics, as costs; of l0 and fvu, infinite where it explains nothing."""
    found = [(cost(x, metrics), cost(y, metrics)) for metrics in measured]
    return [(l0, math.inf if fvu >= 1 else fvu) for l0, fvu in found] if (x, y) == ("l0", "fvu") else found


def pareto(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other equals or beats in both coordinates, by rising x. Of equals, the first."""
    found, least = [], math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < least and math.isfinite(points[i][0]):
            found.append(i)
            least = points[i][1]
    return found


def frontier(points: Sequence[Point]) -> list[int]:
    """Indices of the points (l0, fvu) of the frontier, by rising l0."""
    front = pareto(points)

    def clearly_behind(at: int) -> bool:
        x, y = points[front[at]]
        return any(points[j][0] <= (1 + NEAR) * x and points[j][1] < (1 - CLEAR) * y for j in front[at + 1 :])

    return [i for at, i in enumerate(front) if not clearly_behind(at)]


def interpolate(one: Point, other: Point, x: float) -> float:
    """The line through two points at x."""
    share = (x - one[0]) / (other[0] - one[0])
    return one[1] + share * (other[1] - one[1])


def excesses(points: Sequence[Point]) -> list[float]:
    """The excess of each point (l0, fvu) over the frontier of all; infinite where a coordinate is not finite."""
    front = frontier(points)
    line = [(log(points[i][0]), log(points[i][1])) for i in front]

    def excess(i: int) -> float:
        if i in front:
            return 0.0
        if not all(map(math.isfinite, points[i])):
            return math.inf
        x, y = log(points[i][0]), log(points[i][1])
        after = max(1, bisect.bisect_right([at for at, _ in line], x))
        x = max(x, line[0][0])
        return y - (interpolate(line[after - 1], line[after], x) if after < len(line) else line[-1][1])

    return [excess(i) for i in range(len(points))]


def log_if_positive(values: Iterable[float]) -> Callable[[float], float]:
    """The logarithm, where all values have one; else they stay as they are."""
    return math.log if min(values) > 0 else float


def log(value: float) -> float:
    """Its logarithm; of numbers that are nothing, that of SMALL."""
    return math.log(max(value, SMALL))


def scores(metric: str, measured: Mapping[str, Metrics]) -> dict[str, float]:
    """{trial: what to make small}: its excess if `metric` is frontier, else the metric itself."""
    if metric != "frontier":
        return {name: cost(metric, found) for name, found in measured.items()}
    return dict(zip(measured, excesses(points_of("l0", "fvu", measured.values())), strict=True))
