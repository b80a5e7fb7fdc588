"""Which trial comes next: those of a list in order, or those that Optuna proposes from what the others found."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from xlc_ray.config import UserError
from xlc_ray.config.sweep import Axis, SweepConfig
from xlc_ray.sweeps.board import DONE, Board, Row
from xlc_ray.sweeps.frontier import cost
from xlc_ray.sweeps.space import TRIES, Changes, Trial, make, name_of, walk

CASES = "cases"


class Search(Protocol):
    """What runs trials asks for the next one, and tells what became of it."""

    left: int
    """Trials that are still to come, at most."""

    def next(self) -> Trial | None:
        """The next trial, which is on the board; None when there is none any more."""

    def tell(self, row: Row) -> None:
        """A trial is done."""


def make_search(sweep: SweepConfig, listed: list[Trial], board: Board, before: Mapping[str, Row]) -> Search:
    """The search of a sweep, going on from the rows of an earlier session. Puts what is known on the board.

    `listed`: the trials of a grid or random search."""
    return Proposals(sweep, board, before) if sweep.search.kind == "optuna" else Listed(listed, board, before)


class Listed:
    """A list, without those that an earlier session finished."""

    def __init__(self, listed: list[Trial], board: Board, before: Mapping[str, Row]):
        self.waiting = deque(trial for trial in listed if board.add(trial, before).state not in DONE)
        self.left = len(self.waiting)

    def next(self) -> Trial | None:
        return self.waiting.popleft() if self.waiting else None

    def tell(self, row: Row) -> None:
        pass


class Proposals:
    """Optuna's, by a tree-structured Parzen estimator: of two goals, l0 and fvu, where the metric is the frontier."""

    def __init__(self, sweep: SweepConfig, board: Board, before: Mapping[str, Row]):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "search.kind: the package optuna is missing; pip install 'xlc-ray[optuna]' or choose grid or random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.sweep, self.board = optuna, sweep, board
        self.goals = ("l0", "fvu") if sweep.search.metric == "frontier" else (sweep.search.metric,)
        sampler = optuna.samplers.TPESampler(seed=sweep.search.seed)
        self.study = optuna.create_study(directions=["minimize"] * len(self.goals), sampler=sampler)
        self.asked: dict[str, Any] = {}
        wanted = min(sweep.search.num_samples or 0, sweep.search.max_trials or math.inf)
        self.left = int(wanted)
        for row in before.values():
            self._recall(row, before)

    def _recall(self, row: Row, before: Mapping[str, Row]) -> None:
        """Take over a trial of an earlier session; one that did not end is proposed again, first."""
        trial = make(self.sweep, row.changes, row.trial)
        kept = self.board.add(trial, before)
        params, kinds = self._params(row.changes)
        if kept.state not in DONE:
            del self.board.rows[row.trial]
            self.study.enqueue_trial(params)
            return
        self.left -= 1
        found = self.optuna.trial.create_trial(params=params, distributions=kinds, values=self._values(kept))
        self.study.add_trial(found)

    def next(self) -> Trial | None:
        """Ask until a point comes that no trial has; after many repeats the space counts as used up."""
        for _ in range(TRIES if self.left else 0):
            asked = self.study.ask()
            changes = self._point(asked)
            name = name_of(self.sweep, changes)
            if name in self.board.rows:
                self.study.tell(asked, state=self.optuna.trial.TrialState.FAIL)
                continue
            self.left -= 1
            self.asked[name] = asked
            trial = make(self.sweep, changes, name)
            self.board.add(trial)
            return trial
        return None

    def tell(self, row: Row) -> None:
        asked, values = self.asked.pop(row.trial), self._values(row)
        if all(map(math.isfinite, values)):
            self.study.tell(asked, values)
        else:
            self.study.tell(asked, state=self.optuna.trial.TrialState.FAIL)

    def _values(self, row: Row) -> list[float]:
        return [cost(goal, row.metrics) for goal in self.goals]

    def _point(self, asked: Any) -> Changes:
        def choose(path: str, axis: Axis) -> tuple[Any, ...]:
            if axis.values:
                return (axis.values[asked.suggest_categorical(path, list(range(len(axis.values))))],)
            low, high = axis.extremes
            if axis.kind == "randint":
                return (asked.suggest_int(path, low, high),)
            value = float(f"{asked.suggest_float(path, low, high, log=axis.kind == 'loguniform'):.4g}")
            return (min(max(value, low), high),)

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
