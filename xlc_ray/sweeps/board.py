"""What a sweep knows of its trials while it runs, kept in sweep.json: what resuming reads, and what users read.

A trial is waiting, running, finished (it came to its last step), stopped (cut short at a rung, or because
somebody asked), paused (it came to a
comparison of a population, and has no workers until all have) or failed. Whatever runs the trials tells the board what
they measure, and the board says whether a trial goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xlc_ray import files
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.sweeps.asha import Halving, rungs
from xlc_ray.sweeps.frontier import Metrics, pareto, points_of
from xlc_ray.sweeps.pbt import Move, stops
from xlc_ray.sweeps.rank import PREDICTED, Task, measured
from xlc_ray.sweeps.space import Changes, Trial, settings_of
from xlc_ray.training import logs

FILE = "sweep.json"
METRICS = "metrics.parquet"
DONE = ("finished", "stopped", "failed")


@dataclass
class Row:
    """One trial, as it stands in sweep.json."""

    trial: str
    state: str
    step: int
    """Steps that it has run, as far as it told."""
    steps: int
    """Steps of a trial that is not cut short."""
    settings: dict[str, Any]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of the last stop, on held-out tokens; after a replacement at that stop, of the parameters that it took over."""
    error: str | None = None
    out: str = ""
    changes: Changes = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """Of a population: {step, from, settings} for its start (from: null), and for each time that it was replaced: from
    that step on it trains what `from` had trained until then, with these settings; `error`: what had ended it."""

    @property
    def judged(self) -> Metrics:
        """What it counts by among others: what it measured, unless it failed."""
        return {} if self.state == "failed" else self.metrics


class Board:
    """The trials of one sweep."""

    def __init__(self, sweep: SweepConfig, changed: Callable[[Row, list[Row]], None] = lambda row, rows: None):
        """`changed(row, rows)` is told of each change."""
        self.sweep, self.changed = sweep, changed
        self.rows: dict[str, Row] = {}
        last = sweep.base.train.steps
        self.halving = Halving(
            rungs(sweep.asha, last), sweep.asha.reduction if sweep.asha else 2.0, sweep.search.metric
        )
        self.comparisons = stops(sweep.pbt, last) or self.halving.rungs

    def task(self, trial: Trial) -> Task:
        """A trial, as its ranks are told: what it measures, and at which steps. Of a population: at the next one."""
        at = *self.comparisons, trial.config.train.steps
        if self.sweep.pbt:
            at = (min(stop for stop in at if stop > self.rows[trial.name].step),)
        return Task(trial.name, trial.config, at, self.sweep.search.metric in PREDICTED)

    def add(self, trial: Trial, before: Mapping[str, Row] | None = None) -> Row:
        """Put a trial on the board, as an earlier session left it if that had it: finished and stopped ones are done,
        all others wait, to go on where they were told to."""
        row = Row(trial.name, "waiting", 0, trial.config.train.steps, settings_of(trial.changes))
        row.out, row.changes = files.join("trials", trial.name), trial.changes
        old = (before or {}).get(trial.name)
        if self.sweep.pbt:
            row.history = [{"step": 0, "from": None, "settings": row.settings}]
            row = replace(old, state="waiting" if old.state == "running" else old.state) if old else row
        elif old:
            row.state = old.state if old.state in ("finished", "stopped") else "waiting"
            row.step, row.metrics = old.step, old.metrics
            self._remember(row)
        self.rows[trial.name] = row
        return row

    def keep(self, before: Mapping[str, Row]) -> None:
        """Leave on the board the other trials of an earlier session."""
        for row in before.values():
            if row.trial not in self.rows:
                self.rows[row.trial] = replace(row, state=row.state if row.state in DONE else "waiting")
                self._remember(row)

    def _remember(self, row: Row) -> None:
        # What it measured after that nobody has judged yet.
        told = {s: m for s, m in measured(files.join(self.sweep.out, row.out)).items() if s <= row.step}
        self.halving.remember(row.trial, told, row.state == "stopped")

    def started(self, name: str) -> None:
        """A trial has its workers."""
        self._set(self.rows[name], state="running")

    def reached(self, step: int, found: Mapping[str, Metrics]) -> list[str]:
        """Trials have come to a stop together, and measured this: those that go on at once."""
        come = {name: m for name, m in found.items() if step < self.rows[name].steps}
        on = dict.fromkeys(come, False) if self.sweep.pbt else self.halving.go_on(step, come)
        ends = "paused" if self.sweep.pbt else "stopped"
        for name, metrics in found.items():
            state = "finished" if name not in on else "running" if on[name] else ends
            if state != "running" or step >= self.rows[name].step:  # else it says again what it said before
                self._set(self.rows[name], state=state, step=step, metrics=metrics)
        return [name for name in on if on[name]]

    def diverged(self, name: str, error: str) -> None:
        """A trial's settings came to nothing: it is given up, or waits for its population to replace it."""
        row = self.rows[name]
        later = self.sweep.pbt and any(stop > row.step for stop in self.comparisons)
        self._set(row, state="paused" if later else "failed", error=error)

    def asked_to_stop(self, name: str, step: int) -> None:
        """A trial has ended at a checkpoint because somebody asked for it: it counts as cut there."""
        self._set(self.rows[name], state="stopped", step=step)

    def next_generation(self, step: int, moves: Mapping[str, Move]) -> None:
        """All that are paused go on from `step`, some from others' parameters; but who diverged and is not replaced has
        failed. One write: of a sweep that is killed either all of it counts or nothing."""
        rows = [row for row in self.rows.values() if row.state == "paused"]
        for row in rows:
            if move := moves.get(row.trial):
                now, ended = settings_of(move.changes), {"error": row.error} if row.error else {}
                row.history = [*row.history, {"step": step, "from": move.source, "settings": now, **ended}]
                row.step, row.changes, row.settings, row.error = step, move.changes, now, None
                row.metrics = self.rows[move.source].metrics
            row.state = "failed" if row.error else "waiting"
        self.write()
        for row in rows:
            self.changed(row, list(self.rows.values()))

    def failed(self, name: str, error: str) -> None:
        """A trial is given up."""
        self._set(self.rows[name], state="failed", error=error)

    def waits(self, name: str) -> None:
        """A trial has lost its workers, and will have others."""
        self._set(self.rows[name], state="waiting")

    def left(self, names: Iterable[str]) -> list[str]:
        """Those of these trials that have still to train, before anything else is decided."""
        return [name for name in names if self.rows[name].state not in (*DONE, "paused")]

    def _set(self, row: Row, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(row, name, value)
        self.write()
        self.changed(row, list(self.rows.values()))

    def summary(self) -> dict[str, Any]:
        """trials, failed, pareto_points (l0 against fvu), share_of_full_steps (steps run / steps if none were cut)."""
        rows = list(self.rows.values())
        return {
            "trials": len(rows),
            "finished": sum(row.state == "finished" for row in rows),
            "stopped": sum(row.state == "stopped" for row in rows),
            "failed": sum(row.state == "failed" for row in rows),
            "replaced": sum(len(row.history[1:]) for row in rows),
            "pareto_points": len(pareto(points_of("l0", "fvu", (row.judged for row in rows)))),
            "share_of_full_steps": sum(row.step for row in rows) / max(1, sum(row.steps for row in rows)),
        }

    def write(self) -> None:
        """sweep.json, whole."""
        content = self.summary() | {"rungs": list(self.comparisons), "written": time.time()}
        content["rows"] = [asdict(row) for row in self.rows.values()]
        files.write_json(files.join(self.sweep.out, FILE), content)

    def write_metrics(self) -> None:
        """metrics.parquet: every line of every trial's metrics.jsonl, with the trial's name."""
        lines = [
            {"trial": row.trial} | line
            for row in self.rows.values()
            for line in logs.read(files.join(self.sweep.out, row.out))
        ]
        columns = dict.fromkeys(key for line in lines for key in line)
        table = pa.table({key: [line.get(key) for line in lines] for key in columns})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        files.write_bytes(files.join(self.sweep.out, METRICS), sink.getvalue().to_pybytes())


def read_rows(out: str) -> dict[str, Row]:
    """{trial: row} of the sweep in a directory; empty where there is none."""
    path = files.join(out, FILE)
    if not files.exists(path):
        return {}
    return {row["trial"]: Row(**row) for row in files.read_mapping(path)["rows"]}
