"""The trials of a sweep: points of its space, checked and named before anything runs.

A point is an override {dotted path: value} of the base. Axes apply in the order of the file, `cases` first, so that an
axis may change what an earlier one set, and its `when` sees what the earlier ones decided.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from xlc_ray import files
from xlc_ray.config import Config, UserError, apply_overrides
from xlc_ray.config.sources import LiveSource
from xlc_ray.config.sweep import Axis, SweepConfig
from xlc_ray.sweeps.names import name_of, short_hash
from xlc_ray.training import loop

Changes = dict[str, Any]
Choose = Callable[[str, Axis], tuple[Any, ...]]
"""(path, axis) → the values to take there, in order."""
MOST_CORNERS = 50_000
INDIFFERENT = tuple(path for path in loop.FREE if path not in ("cluster", "evaluate"))
"""Settings that decide no trial's result. How a trial is measured is part of that, and where it runs of what it is."""
TRIES = 100
"""Draws for each sample that is wanted, before a space counts as used up."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep."""

    name: str
    """What differs, as in `batchtopk,k=32,lr=0.002`; its directory's name."""
    changes: Changes
    config: Config
    """Its settings, with `out` its directory."""

    @property
    def workers(self) -> int:
        """Its ranks."""
        return self.config.cluster.tensor_parallel * self.config.cluster.replicas

    @property
    def models(self) -> int:
        """Language models that make what it, or its group, reads."""
        return self.config.cluster.model_actors if isinstance(self.config.source, LiveSource) else 0

    @property
    def cpus(self) -> float:
        """CPUs that it reserves."""
        cluster = self.config.cluster
        return self.workers * cluster.cpus_per_worker + self.models * cluster.cpus_per_model

    @property
    def gpus(self) -> float:
        """GPUs that it reserves."""
        cluster = self.config.cluster
        return self.workers * cluster.gpus_per_worker + self.models * cluster.gpus_per_model


def trials(sweep: SweepConfig, limit: int | None = None) -> list[Trial]:
    """The first `limit` trials of a grid or random search, in order; none of a search that decides as it goes. Raises
    UserError, with the point, on settings that do not fit together or that come twice, and on an axis that applies
    nowhere."""
    _check_conditions(sweep)
    if sweep.search.kind == "optuna":
        return []
    every = walk(sweep, range(len(sweep.cases)), lambda _, axis: axis.extremes)
    points = every if sweep.search.kind == "grid" else _draws(sweep)
    chosen = list(itertools.islice(points, least(sweep.search.max_trials, limit)))
    names = [name_of(sweep, point) for point in chosen]
    if sweep.pbt:  # settings change, names do not
        names = [f"member_{i:0{len(str(len(chosen) - 1))}}" for i in range(len(chosen))]
    found = [
        make(sweep, point, f"{name}-{short_hash(repr(point))}" if name in names[:i] else name)
        for i, (point, name) in enumerate(zip(chosen, names, strict=True))
    ]
    seen: dict[str, Trial] = {}
    for trial in found:
        twin = seen.setdefault(_identity(trial.config), trial)
        if twin is not trial:
            raise UserError(f"space: {trial.changes} repeats the settings of {twin.changes}")
    return found


def least(*limits: int | None) -> int | None:
    """The smallest of those that are given."""
    return min((limit for limit in limits if limit is not None), default=None)


def make(sweep: SweepConfig, changes: Changes, name: str) -> Trial:
    """The trial of a point. Raises UserError where its settings do not fit together."""
    config = _config(sweep, changes).override({"out": files.join(sweep.out, "trials", name)})
    if config.train.wandb:
        config = config.override({"train.wandb.group": files.name(sweep.out)})
    return Trial(name, changes, config)


def corners(sweep: SweepConfig) -> list[Trial]:
    """Each combination of choices and ends of ranges, validated. Raises UserError with the first that is wrong, and on
    a range of fractions for a whole number."""
    points = walk(sweep, range(len(sweep.cases)), lambda _, axis: axis.extremes)
    found = list(itertools.islice(points, MOST_CORNERS + 1))
    if len(found) > MOST_CORNERS:
        raise UserError(f"space: more than {MOST_CORNERS:,} corners, too many to check; give fewer axes or choices")
    made = [make(sweep, point, name_of(sweep, point)) for point in found]
    for path, axis in sweep.space.items():
        there = next((trial for trial in made if path in trial.changes), None)
        broken = there and axis.kind in ("uniform", "loguniform")
        if broken and isinstance(lookup(there.config.model_dump(), path), int):
            raise UserError(
                f"space.{path}: {axis.kind} gives fractions, the setting is a whole number; allowed: randint, choice"
            )
    return made


def walk(sweep: SweepConfig, cases: range | list[int], choose: Choose) -> Iterator[Changes]:
    """Points as nested loops: the given cases outermost, then the axes in their order, the last changing fastest."""
    base = sweep.base.model_dump(mode="json")
    axes = list(sweep.space.items())

    def inner(changes: Changes, left: int) -> Iterator[Changes]:
        if left == len(axes):
            yield changes
            return
        path, axis = axes[left]
        if not applies(axis, base, changes):
            yield from inner(changes, left + 1)
            return
        for value in choose(path, axis):
            yield from inner({**changes, path: value}, left + 1)

    for case in cases if sweep.cases else [None]:
        yield from inner({} if case is None else dict(sweep.cases[case]), 0)


def applies(axis: Axis, base: dict[str, Any], changes: Changes) -> bool:
    """Whether the settings say what the axis's `when` asks for."""
    if not axis.when:
        return True
    tree = apply_overrides(base, changes)
    return all(
        lookup(_with_defaults(tree, path.split(".")[0]), path) in (wanted if isinstance(wanted, list) else [wanted])
        for path, wanted in axis.when.items()
    )


def _with_defaults(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """One section, whole; as it is, where what is set so far makes none."""
    try:
        return {name: _section_type(name).dump_python(_section_type(name).validate_python(tree[name]), mode="json")}
    except ValidationError:
        return tree


@functools.cache
def _section_type(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(Config.model_fields[name].rebuild_annotation())


def _check_conditions(sweep: SweepConfig) -> None:
    """Of axes whose `when` no range decides, nor an axis that hangs on one: each applies somewhere."""
    left, loose = set(), []
    for path, axis in sweep.space.items():
        hangs = any(within(asked, loose) for asked in axis.when)
        if hangs or not axis.values:
            loose.append(path)
        if axis.when and not hangs:
            left.add(path)
    points = walk(sweep, range(len(sweep.cases)), lambda _, axis: axis.extremes)
    for _ in range(MOST_CORNERS if left else 0):
        if (point := next(points, None)) is None:
            path = min(left)
            raise UserError(f"space.{path}.when: {sweep.space[path].when} holds nowhere, so that the axis never varies")
        if not (left := left - point.keys()):
            return


def within(path: str, sections: Iterable[str]) -> bool:
    """Whether a dotted path is one of these, or inside."""
    return any(f"{path}.".startswith(f"{section}.") for section in sections)


def lookup(tree: Any, path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def draw(axis: Axis, rng: np.random.Generator) -> Any:
    """One value of an axis. Numbers are rounded to four digits, which read well and change nothing."""
    if axis.values:
        return axis.values[rng.integers(len(axis.values))]
    low, high = axis.extremes
    if axis.kind == "randint":
        return int(rng.integers(low, high, endpoint=True))
    if axis.kind == "loguniform":
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        value = rng.uniform(low, high)
    return rounded(value, low, high)


def rounded(value: float, low: float, high: float) -> float:
    """To four digits, within a range."""
    return min(max(float(f"{value:.4g}"), low), high)


def settings_of(changes: Changes) -> dict[str, Any]:
    """{leaf path: value} of what a point sets: a row's columns."""
    return flatten(apply_overrides({}, changes))


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """{dotted path: value} of all leaves."""
    if not isinstance(tree, dict) or (path and not tree):
        return {path: tree}
    return {k: v for key, inner in tree.items() for k, v in flatten(inner, f"{path}.{key}".lstrip(".")).items()}


def _draws(sweep: SweepConfig) -> Iterator[Changes]:
    """Samples that differ, each once at every point of the grid axes; without points whose settings do not fit
    together."""
    rng = np.random.default_rng(sweep.search.seed)
    wanted, seen = sweep.search.num_samples or 0, set()
    taken, refused = 0, ""
    for _ in range(TRIES * wanted):
        if taken == wanted:
            return
        fresh = []
        for point in _sample(sweep, rng):
            if (key := repr(sorted(point.items()))) in seen:
                continue
            seen.add(key)
            try:
                _config(sweep, point)
                fresh.append(point)
            except UserError as error:
                refused = f"; {error}"
        taken += bool(fresh)
        yield from fresh
    if taken < wanted:
        raise UserError(f"search.num_samples: {wanted}, but the space holds {taken} different points{refused}")


def _sample(sweep: SweepConfig, rng: np.random.Generator) -> list[Changes]:
    """One draw of every axis, at each point of the grid axes."""
    drawn: Changes = {}

    def choose(path: str, axis: Axis) -> tuple[Any, ...]:
        if not axis.grid and path not in drawn:
            drawn[path] = draw(axis, rng)
        return axis.grid or (drawn[path],)

    case = [int(rng.integers(len(sweep.cases)))] if sweep.cases else range(0)
    return list(walk(sweep, case, choose))


def _config(sweep: SweepConfig, changes: Changes) -> Config:
    try:
        return sweep.base.override(changes)
    except UserError as error:
        shown = ", ".join(f"{path}={value}" for path, value in changes.items())
        raise UserError(f"space: {shown}: {str(error).removeprefix('override: ')}") from None


def _identity(config: Config) -> str:
    """Equal for runs that differ in nothing that decides their result."""
    decisive = flatten(config.model_dump(mode="json")).items()
    return repr({path: value for path, value in decisive if not within(path, INDIFFERENT)})
