"""What a sweep found, read from its directory at any time: a frame, the frontier, the best at a sparsity, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.config.errors import nearest
from xlc_ray.sweeps import drawing, page
from xlc_ray.sweeps.board import FILE, Row, read_rows
from xlc_ray.sweeps.frontier import Point, cost, interpolate, is_error, log_if_positive, pareto, points_of
from xlc_ray.sweeps.rank import MEASURED, PREDICTED
from xlc_ray.training import logs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Best:
    """The answer of `Sweep.best`."""

    trial: str
    """The trial, or the nearer one of the two between which the value was read off."""
    out: str
    """Its run directory, for evaluate, export and load."""
    value: float
    """The metric, by interpolation where `how` says so."""
    at: dict[str, float]
    """Where: as asked for; of how = nearest, that of the trial."""
    how: str
    """measured, interpolated (on the straight line between two trials of the frontier; over the logarithm of where they
    lie, and of the metric if it is an error, as far as values are above 0) or nearest (the frontier does not reach as
    far as asked)."""
    metrics: dict[str, float]
    """All that the trial measured."""


class Sweep:
    """A sweep's directory."""

    def __init__(self, out: str):
        """Raises UserError where there is no sweep."""
        if not files.exists(files.join(out, FILE)):
            raise UserError(f"{out}: no {FILE} here; expected the directory of a sweep")
        self.out = out

    def rows(self) -> list[Row]:
        """The trials as they stand now, in the order of the space."""
        return list(read_rows(self.out).values())

    def check(self) -> None:
        """Raises UserError where every trial failed."""
        rows = self.rows()
        if rows and all(row.state == "failed" for row in rows):
            raise UserError(f"{self.out}: every trial failed, {rows[0].trial} by: {rows[0].error}")

    def frame(self) -> pd.DataFrame:
        """One row a trial: trial, state, step, its settings by dotted path, its metrics on held-out tokens at its last
        stop, out, error. A setting that a trial does not have is missing there; one that is a list or a mapping is its
        text."""
        import pandas as pd

        rows = self.rows()
        names = [*MEASURED, *(name for name in PREDICTED if any(name in row.metrics for row in rows))]
        found = [
            {"trial": row.trial, "state": row.state, "step": row.step}
            | {path: _cell(value) for path, value in row.settings.items()}
            | {name: row.metrics.get(name, math.nan) for name in names}
            | {"out": files.join(self.out, row.out), "error": row.error}
            for row in rows
        ]
        settings = dict.fromkeys(path for row in rows for path in row.settings)
        columns = ["trial", "state", "step", *settings, *names, "out", "error"]
        whole = {path: "Int64" for path in settings if _has_gaps([row.settings.get(path) for row in rows])}
        return pd.DataFrame(found, columns=columns).astype(whole)

    def lineage(self, trial: str) -> pd.DataFrame:
        """Under which settings the parameters of a trial were trained: a row a stretch of steps, `begin` to `end`, with
        the `trial` that trained them there. One row, unless it was replaced in a population. Raises UserError."""
        import pandas as pd

        rows = {row.trial: row for row in self.rows()}
        if trial not in rows:
            raise UserError(f"{trial}: no such trial; {nearest(trial, list(rows))}")
        name, end, parts = trial, rows[trial].step, []
        while name is not None:
            past = rows[name].history or [{"step": 0, "from": None, "settings": rows[name].settings}]
            begun = [told for told in past if told["step"] <= end][-1]
            parts += [{"begin": begun["step"], "end": end, "trial": name} | begun["settings"]] * (begun["step"] < end)
            name, end = begun["from"], begun["step"]
        return pd.DataFrame(parts[::-1])

    def pareto(self, x: str = "l0", y: str = "fvu") -> pd.DataFrame:
        """The rows of the frame that no other equals or beats in both metrics, by rising x; of l0 and fvu none with
        fvu ≥ 1, and none that failed."""
        _check(x, y)
        points = points_of(x, y, (row.judged for row in self.rows()))
        return self.frame().iloc[pareto(points)].reset_index(drop=True)

    def best(self, metric: str = "fvu", at: Mapping[str, float] | None = None) -> Best:
        """The trial with the best `metric`, of those that did not fail; with `at`, e.g. {"l0": 64}, at that value of
        another metric.

        Then it is read off the frontier of the two, which says how. Raises UserError where nothing was measured."""
        _check(metric, *(at or {}))
        if at is not None and len(at) != 1:
            raise UserError(f"at: {dict(at)}; give one metric and its value, such as {{'l0': 64}}")
        rows = [row for row in self.rows() if math.isfinite(cost(metric, row.judged))]
        if not rows:
            raise UserError(f"{self.out}: no trial has measured {metric} yet")
        if not at:
            return self._best(min(rows, key=lambda row: cost(metric, row.metrics)), metric, {}, "measured")
        ((name, wanted),) = at.items()
        line = [rows[i] for i in pareto(points_of(name, metric, (row.metrics for row in rows)))]
        if not line:
            raise UserError(f"{self.out}: no trial lies on the frontier of {name} and {metric}")
        return self._at(line, metric, name, float(wanted))

    def _at(self, line: list[Row], metric: str, name: str, wanted: float) -> Best:
        def point(row: Row) -> Point:
            return float(row.metrics[name] or 0.0), float(row.metrics[metric] or 0.0)

        line = sorted(line, key=point)
        below = [row for row in line if point(row)[0] <= wanted][-1:]
        above = [row for row in line if point(row)[0] >= wanted][:1]
        found = [point(row) for row in (*below, *above)]
        across = log_if_positive([wanted, *(x for x, _ in found)])
        nearest = min((*below, *above), key=lambda row: abs(across(point(row)[0]) - across(wanted)))
        if point(nearest)[0] == wanted:
            return self._best(nearest, metric, {name: wanted}, "measured")
        if len(found) == 1:
            return self._best(nearest, metric, {name: point(nearest)[0]}, "nearest")
        up = log_if_positive(y for _, y in found) if is_error(metric) else float
        one, other = ((across(x), up(y)) for x, y in found)
        value = interpolate(one, other, across(wanted))
        return self._best(nearest, metric, {name: wanted}, "interpolated", math.exp(value) if up is math.log else value)

    def _best(self, row: Row, metric: str, at: dict[str, float], how: str, value: float | None = None) -> Best:
        found = {k: v for k, v in row.metrics.items() if v is not None}
        return Best(row.trial, files.join(self.out, row.out), found[metric] if value is None else value, at, how, found)

    def plot(self, path: str, x: str = "l0", y: str = "fvu") -> str:
        """Write the sweep's page to `path`, and return that: the frontier of two metrics, the settings, the learning
        curves and a table, in one file. To a path that ends in .svg: the frontier alone; raises UserError where nothing
        was measured."""
        _check(x, y)
        rows, best = [asdict(row) for row in self.rows()], set(self.pareto(x, y)["trial"])
        if path.endswith(".svg"):
            if not any(drawing.has(row, x, y) for row in rows):
                raise UserError(
                    f"{self.out}: no trial has measured {x} and {y} yet; a path that ends in .html shows all"
                )
            files.write_bytes(path, page.picture(rows, best, x, y).encode())
            return path
        summary = files.read_mapping(files.join(self.out, FILE))
        lines = [_unexplained(files.join(self.out, row["out"])) for row in rows]
        files.write_bytes(path, page.report(self.out, summary, rows, lines, best, x, y).encode())
        return path


def _unexplained(run_dir: str) -> list[tuple[int, float]]:
    found = [(line["step"], 1 - line["explained_variance"]) for line in logs.read(run_dir)]
    return [(step, value) for step, value in found if math.isfinite(value) and value > 0]


def _check(*names: str) -> None:
    for name in names:
        if name not in (*MEASURED, *PREDICTED):
            raise UserError(f"{name!r} is not measured by sweeps; allowed: {', '.join((*MEASURED, *PREDICTED))}")


def _cell(value: Any) -> Any:
    return str(list(value)) if isinstance(value, list | tuple) else str(value) if isinstance(value, dict) else value


def _has_gaps(values: list[Any]) -> bool:
    """Whether all are whole numbers, but for some that are missing."""
    there = [value for value in values if value is not None]
    return 0 < len(there) < len(values) and all(type(value) is int for value in there)
