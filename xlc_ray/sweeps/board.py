"""What a sweep knows of its trials while it runs, kept in sweep.json: what resuming reads, and what users read.

A trial is waiting, running, finished (it came to its last step), stopped (cut short at a rung) or failed. Whatever runs
the trials tells the board what they measure, and the board says whether a trial goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xlc_ray import files
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.sweeps.asha import Halving, rungs
from xlc_ray.sweeps.frontier import Metrics, cost, pareto
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
    """Of the last stop, on held-out tokens."""
    error: str | None = None
    out: str = ""
    changes: Changes = field(default_factory=dict)


class Board:
    """The trials of one sweep."""

    def __init__(self, sweep: SweepConfig, changed: Callable[[Row, list[Row]], None] = lambda row, rows: None):
        """`changed(row, rows)` is told of each change."""
        self.sweep, self.changed = sweep, changed
        self.rows: dict[str, Row] = {}
        self.halving = Halving(
            rungs(sweep.asha, sweep.base.train.steps), sweep.asha.reduction if sweep.asha else 2.0, sweep.search.metric
        )

    def task(self, trial: Trial) -> Task:
        """A trial, as its ranks are told: what it measures, and at which steps."""
        stops = *self.halving.rungs, trial.config.train.steps
        return Task(trial.name, trial.config, stops, self.sweep.search.metric in PREDICTED)

    def add(self, trial: Trial, before: Mapping[str, Row] | None = None) -> Row:
        """Put a trial on the board, as an earlier session left it if that had it: finished and stopped ones are done,
        all others wait."""
        row = Row(trial.name, "waiting", 0, trial.config.train.steps, settings_of(trial.changes))
        row.out, row.changes = files.join("trials", trial.name), trial.changes
        old = (before or {}).get(trial.name)
        if old and old.state in ("finished", "stopped"):
            row.state, row.step, row.metrics = old.state, old.step, old.metrics
            self.halving.remember(trial.name, measured(trial.config.out), old.state == "stopped")
        self.rows[trial.name] = row
        return row

    def started(self, name: str) -> None:
        """A trial has its workers."""
        self._set(self.rows[name], state="running")

    def reached(self, step: int, found: Mapping[str, Metrics]) -> list[str]:
        """Trials have come to a stop together, and measured this: those that go on."""
        on = self.halving.go_on(step, {name: m for name, m in found.items() if step < self.rows[name].steps})
        for name, metrics in found.items():
            state = "finished" if name not in on else "running" if on[name] else "stopped"
            self._set(self.rows[name], state=state, step=step, metrics=metrics)
        return [name for name in on if on[name]]

    def failed(self, name: str, error: str) -> None:
        """A trial is given up."""
        self._set(self.rows[name], state="failed", error=error)

    def waits(self, name: str) -> None:
        """A trial has lost its workers, and will have others."""
        self._set(self.rows[name], state="waiting")

    def left(self, names: Iterable[str]) -> list[str]:
        """Those of these trials that are not done."""
        return [name for name in names if self.rows[name].state not in DONE]

    def _set(self, row: Row, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(row, name, value)
        self.write()
        self.changed(row, list(self.rows.values()))

    def summary(self) -> dict[str, Any]:
        """trials, failed, pareto_points (l0 against fvu), share_of_full_steps (steps run / steps if none were cut)."""
        rows = list(self.rows.values())
        shown = [row for row in rows if row.metrics]
        points = [(cost("l0", row.metrics), cost("fvu", row.metrics)) for row in shown]
        return {
            "trials": len(rows),
            "finished": sum(row.state == "finished" for row in rows),
            "stopped": sum(row.state == "stopped" for row in rows),
            "failed": sum(row.state == "failed" for row in rows),
            "pareto_points": len(pareto(points)),
            "share_of_full_steps": sum(row.step for row in rows) / max(1, sum(row.steps for row in rows)),
        }

    def write(self) -> None:
        """sweep.json, whole."""
        content = self.summary() | {"rungs": list(self.halving.rungs), "written": time.time()}
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
