"""Which trial comes next: those of a list in order, or those that Optuna proposes from what the others found."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

from xlc_ray.config import UserError
from xlc_ray.config.sweep import Axis, SweepConfig
from xlc_ray.sweeps.board import DONE, Board, Row
from xlc_ray.sweeps.frontier import cost
from xlc_ray.sweeps.names import name_of
from xlc_ray.sweeps.space import TRIES, Changes, Trial, least, make, rounded, walk

CASES = "cases"
Group = tuple[Trial, ...]
"""Trials that share a stream, in one worker group; most often one trial."""


class Search(Protocol):
    """What runs trials asks for the next one, and tells what became of it."""

    @property
    def left(self) -> int:
        """Trials that are still to come, at most."""

    def next(self) -> Group | None:
        """The next trial, or trials that train together, on the board; None when there are none any more."""

    def tell(self, row: Row) -> None:
        """A trial is done."""


def grouped(trials: Iterable[Trial], stream: Callable[[Trial], Hashable], *most: int | None) -> list[Group]:
    """Trials of equal streams together, at most so many, each where the first of them was."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(stream(trial), []).append(trial)
    size = min([n for n in most if n] + [max(map(len, groups.values()), default=1)])
    return [tuple(group[i : i + size]) for group in groups.values() for i in range(0, len(group), size)]


class Listed:
    """A list, without those that an earlier session finished."""

    def __init__(self, listed: list[Trial], board: Board, before: Mapping[str, Row]):
        self.listed = listed
        self.waiting: deque[Group] = deque((trial,) for trial in listed if board.add(trial, before).state not in DONE)

    @property
    def left(self) -> int:
        return sum(map(len, self.waiting))

    def share(self, stream: Callable[[Trial], Hashable], *most: int | None) -> int:
        """Put trials of equal streams together, at most so many, with whom they were in an earlier session. The largest
        size."""
        left = {trial.name for trial in itertools.chain(*self.waiting)}
        groups = (tuple(t for t in group if t.name in left) for group in grouped(self.listed, stream, *most))
        self.waiting = deque(group for group in groups if group)
        return max(map(len, self.waiting), default=1)

    def part(self, trials: Iterable[Trial]) -> None:
        """These come next, each by itself."""
        self.waiting.extendleft((trial,) for trial in reversed(list(trials)))

    def next(self) -> Group | None:
        return self.waiting.popleft() if self.waiting else None

    def tell(self, row: Row) -> None:
        pass


class Proposals:
    """Optuna's, by a tree-structured Parzen estimator: of two goals, l0 and fvu, where the metric is the frontier."""

    def __init__(self, sweep: SweepConfig, board: Board, before: Mapping[str, Row], limit: int | None = None):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "search.kind: the package optuna is missing; pip install -e '.[optuna]' or choose grid or random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.sweep, self.board = optuna, sweep, board
        self.goals = ("l0", "fvu") if sweep.search.metric == "frontier" else (sweep.search.metric,)
        sampler = optuna.samplers.TPESampler(seed=sweep.search.seed)
        self.study = optuna.create_study(directions=["minimize"] * len(self.goals), sampler=sampler)
        self.asked: dict[str, Any] = {}
        self.unfinished: set[str] = set()
        self.left = least(sweep.search.num_samples, sweep.search.max_trials, limit) or 0
        for row in before.values():
            self._recall(row, before)
        self.left = max(0, self.left)

    def _recall(self, row: Row, before: Mapping[str, Row]) -> None:
        """Take over a trial of an earlier session; one that did not end is proposed again, first."""
        trial = make(self.sweep, row.changes, row.trial)
        kept = self.board.add(trial, before)
        params, kinds = self._params(row.changes)
        if kept.state not in DONE:
            self.unfinished.add(row.trial)
            self.study.enqueue_trial(params)
            return
        self.left -= 1
        values, state, constraints = self._answer(kept)
        found = self.optuna.trial.create_trial(
            params=params, distributions=kinds, values=values, state=state, constraints=constraints
        )
        self.study.add_trial(found)

    def next(self) -> Group | None:
        """Ask until a point comes that no trial has, and whose settings fit together; after many others the space
        counts as used up."""
        for _ in range(TRIES if self.left else 0):
            asked = self.study.ask()
            changes = self._point(asked)
            name = name_of(self.sweep, changes)
            trial = None if name in self.board.rows and name not in self.unfinished else self._made(changes, name)
            if trial is None:
                self.study.tell(asked, state=self.optuna.trial.TrialState.FAIL)
                continue
            self.left -= 1
            self.asked[name] = asked
            if name not in self.unfinished:
                self.board.add(trial)
            self.unfinished.discard(name)
            return (trial,)
        self.left = 0
        return None

    def _made(self, changes: Changes, name: str) -> Trial | None:
        try:
            return make(self.sweep, changes, name)
        except UserError:  # between corners, all of which do fit
            return None

    def tell(self, row: Row) -> None:
        asked, (values, state, constraints) = self.asked.pop(row.trial), self._answer(row)
        for name, excess in constraints.items():
            asked.set_constraint(name, excess)
        self.study.tell(asked, values, state)

    def _answer(self, row: Row) -> tuple[list[float] | None, Any, dict[str, float]]:
        """Values of the goals, how the trial ended, and constraints (kept at 0 and below). Of l0 and fvu one holds: a
        dictionary without active features, sparser than all, must not draw the search."""
        values = [cost(goal, row.judged) for goal in self.goals]
        if not all(map(math.isfinite, values)):
            return None, self.optuna.trial.TrialState.FAIL, {}
        constraints = {"fvu below 1": values[1] - 1} if len(values) == 2 else {}
        return values, self.optuna.trial.TrialState.COMPLETE, constraints

    def _point(self, asked: Any) -> Changes:
        def choose(path: str, axis: Axis) -> tuple[Any, ...]:
            if axis.values:
                return (axis.values[asked.suggest_categorical(path, list(range(len(axis.values))))],)
            low, high = axis.extremes
            if axis.kind == "randint":
                return (asked.suggest_int(path, low, high),)
            return (rounded(asked.suggest_float(path, low, high, log=axis.kind == "loguniform"), low, high),)

        count = len(self.sweep.cases)
        case = [asked.suggest_categorical(CASES, list(range(count)))] if count else range(0)
        return next(walk(self.sweep, case, choose))

    def _params(self, changes: Changes) -> tuple[dict[str, Any], dict[str, Any]]:
        """Optuna's parameters of a point, and how each is distributed."""
        d = self.optuna.distributions
        params: dict[str, Any] = {}
        kinds: dict[str, Any] = {}
        for i, case in enumerate(self.sweep.cases):
            if all(path in self.sweep.space or changes.get(path) == value for path, value in case.items()):
                params[CASES] = i
                kinds[CASES] = d.CategoricalDistribution(list(range(len(self.sweep.cases))))
        for path, axis in self.sweep.space.items():
            if path not in changes:
                continue
            if axis.values:
                params[path] = list(axis.values).index(changes[path])
                kinds[path] = d.CategoricalDistribution(list(range(len(axis.values))))
                continue
            params[path], (low, high) = changes[path], axis.extremes
            if axis.kind == "randint":
                kinds[path] = d.IntDistribution(low, high)
            else:
                kinds[path] = d.FloatDistribution(low, high, log=axis.kind == "loguniform")
        return params, kinds
