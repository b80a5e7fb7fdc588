"""Population based training (Jaderberg et al. 2017), in generations: at each stop the whole population is compared.

Of n trials the worst q n go on from the parameters of trials drawn from the best q n, with settings a little off
theirs. By excess (frontier.py) all of the frontier is best, and none of it is ever replaced: a trial gives way only to
one that is better. What happens is a function of what was measured and of the seed, whoever came first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from xlc_ray.config import UserError
from xlc_ray.config.sweep import Axis, Pbt, SweepConfig
from xlc_ray.sweeps.frontier import Metrics, scores
from xlc_ray.sweeps.space import Changes, draw, rounded, walk

Explore = Callable[[Changes, np.random.Generator], Changes]
"""(settings of a trial, randomness) → settings near them."""


@dataclass(frozen=True)
class Move:
    """What becomes of a trial that is replaced."""

    source: str
    """The trial from whose parameters it goes on."""
    changes: Changes
    """Its settings from now on."""


def stops(settings: Pbt | None, last: int) -> tuple[int, ...]:
    """Steps of the comparisons of a run of `last` steps, all below that."""
    return tuple(range(settings.interval, last, settings.interval)) if settings else ()


def replaced(quantile: float, size: int) -> int:
    """How many of a population are replaced at a stop, at most. Raises UserError where that is nobody."""
    if found := int(quantile * size + 1e-9):
        return found
    raise UserError(
        f"pbt.quantile: {quantile:g} of {size} trial{'s' * (size != 1)} is nobody; use at least "
        f"{math.ceil(1 / quantile)} trials{f', or a quantile of {1 / size:.2g} to 0.5' if size > 1 else ''}"
    )


class Population:
    """Who goes on from whose parameters."""

    def __init__(self, names: Sequence[str], number: int, metric: str, seed: int, explore: Explore):
        """`names`: of all trials, whose order settles ties; `number`: of those that are replaced at a stop."""
        self.places = {name: place for place, name in enumerate(names)}
        self.number, self.metric, self.seed, self.explore = number, metric, seed, explore

    def decide(self, step: int, measured: Mapping[str, Metrics], settings: Mapping[str, Changes]) -> dict[str, Move]:
        """{trial: its move} of those that are replaced at a stop, of all that are `measured` there. Nothing measured is
        worse than anything, so that whoever diverged is replaced; while any trial did not."""
        found = scores(self.metric, {name: measured[name] for name in self.places if name in measured})
        ranked = sorted(found, key=found.__getitem__)
        lost = sum(not math.isfinite(score) for score in found.values())
        number = min(self.number, len(ranked) // 2)
        cut = len(ranked) - max(number, lost)
        ahead, behind = ranked[:cut], ranked[cut:]
        if not ahead or not behind:
            return {}
        least = found[ahead[min(max(number, 1), len(ahead)) - 1]]
        best = [name for name in ahead if found[name] <= least]
        moves = {}
        for name in behind:
            rng = np.random.default_rng([self.seed, step, self.places[name]])
            source = best[rng.integers(len(best))]
            if found[source] < found[name]:
                moves[name] = Move(source, self.explore(settings[source], rng))
        return moves


def population(sweep: SweepConfig, names: Sequence[str]) -> Population:
    """That of a sweep. Raises UserError where it is too small."""
    assert sweep.pbt is not None
    number, search = replaced(sweep.pbt.quantile, len(names)), sweep.search
    return Population(names, number, search.metric, search.seed, partial(explore, sweep, sweep.pbt))


def explore(sweep: SweepConfig, pbt: Pbt, changes: Changes, rng: np.random.Generator) -> Changes:
    """A point of the space near another one."""

    def choose(path: str, axis: Axis) -> tuple[Any, ...]:
        anew = path not in changes or rng.random() < pbt.resample
        return (draw(axis, rng) if anew else near(axis, changes[path], pbt.factor, rng),)

    return next(walk(sweep, range(0), choose))


def near(axis: Axis, value: Any, factor: float, rng: np.random.Generator) -> Any:
    """A value beside another one, with equal chance above or below it: by a factor, or the next of a choice (numbers by
    size, others in the order of the file). At the end of its range it stays there."""
    up = bool(rng.integers(2))
    if axis.values:
        plain = all(isinstance(v, int | float) for v in axis.values)
        order = sorted(axis.values) if plain else list(axis.values)
        place = order.index(value) + (1 if up else -1)
        return order[min(max(place, 0), len(order) - 1)]
    low, high = axis.extremes
    moved = value * factor if up else value / factor
    if axis.kind == "randint":
        return min(max(value + 1, round(moved)), high) if up else max(min(value - 1, round(moved)), low)
    return rounded(moved, low, high)
