"""What a sweep knows of its trials while it runs, kept in sweep.json: what resuming reads, and what users read.

A trial is waiting, running, finished (it came to its last step), stopped (cut short at a rung) or failed. Whatever runs
the trials tells the board what they measure, and the board says whether a trial goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xlc_ray import files
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.sweeps.asha import Halving, rungs
from xlc_ray.sweeps.frontier import cost, pareto
from xlc_ray.sweeps.rank import PREDICTED, measured
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

    @property
    def predictions(self) -> bool:
        """Whether trials are measured by what the language model predicts, too."""
        return self.sweep.search.metric in PREDICTED

    def stops(self, trial: Trial) -> tuple[int, ...]:
        """The steps at which a trial is measured."""
        return (*self.halving.rungs, trial.config.train.steps)

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

    def reached(self, name: str, step: int, metrics: Mapping[str, float | None]) -> bool:
        """A trial has come to a stop; whether it goes on."""
        row = self.rows[name]
        if step == row.steps:
            self._set(row, state="finished", step=step, metrics=metrics)
            return False
        on = self.halving.goes_on(name, step, metrics)
        self._set(row, state="running" if on else "stopped", step=step, metrics=metrics)
        return on

    def failed(self, name: str, error: str) -> None:
        """A trial is given up."""
        self._set(self.rows[name], state="failed", error=error)

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
