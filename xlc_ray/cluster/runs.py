"""Runs and sweeps, as their directories show them: how far, how fast, and whether anybody still works on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from xlc_ray import files
from xlc_ray.cluster import driver
from xlc_ray.cluster.driver import Driver
from xlc_ray.config import UserError, yaml_text
from xlc_ray.config.errors import nearest
from xlc_ray.training import logs

DEPTH = 3
"""Directories below the one that is looked at."""
QUIET_SECONDS = 60.0
"""A run is stalled when it writes nothing for this long, and for QUIET_LINES times what a line usually takes."""
QUIET_LINES = 5
OVER = ("finished", "interrupted", "failed", "stopped")
TRIALS = "trials"
BOARD = "sweep.json"
"""Where a sweep says which of its trials are over: `rows` of trial, state and error."""


@dataclass(frozen=True)
class Run:
    """A row of the table: a run, a sweep, or a trial of one."""

    name: str
    path: str
    state: str
    """starting, running, stalled, finished, interrupted, failed; stopped: nobody drives it, or its sweep ended it;
    paused: it waits for the others of its population."""
    driver: Driver | None = None
    """Of a trial: its sweep's."""
    metrics: dict[str, Any] | None = None
    """The newest line of metrics.jsonl."""
    done: str = ""
    """Steps of all steps, or trials."""
    left: float | None = None
    """Seconds to the last step."""
    age: float | None = None
    """Seconds since something was written."""
    trial: bool = False
    error: str | None = None
    """What made it fail."""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER


def find(directory: str) -> list[Run]:
    """Runs and sweeps in a directory, or the one that it is; trials follow their sweep."""
    return list(_walk(directory, "", DEPTH))


def pick(runs: list[Run], name: str) -> Run:
    """The run of a name. Raises UserError with the nearest."""
    for run in runs:
        if name in (run.name, run.path):
            return run
    raise UserError(f"{name}: no such run; {nearest(name, [run.name for run in runs]) if runs else 'there are none'}")


def _walk(directory: str, name: str, depth: int) -> Iterator[Run]:
    names = files.listdir(directory)
    if TRIALS in names:
        yield from _sweep(directory, name or files.name(directory))
    elif "config.yaml" in names and {"checkpoints", logs.FILE, driver.FILE} & set(names):
        yield _run(directory, name or files.name(directory), None, {})
    elif depth:
        for inner in files.directories(directory):
            yield from _walk(files.join(directory, inner), f"{name}/{inner}".lstrip("/"), depth - 1)


def _sweep(path: str, name: str) -> Iterator[Run]:
    own, folder, board = driver.read(path), files.join(path, TRIALS), files.join(path, BOARD)
    told = {row["trial"]: row for row in files.read_mapping(board)["rows"]} if files.exists(board) else {}
    found = [
        _run(files.join(folder, trial), f"{name}/{trial}", own, told.get(trial, {}), trial=True)
        for trial in files.directories(folder)
        if files.exists(files.join(folder, trial, "config.yaml"))
    ]
    over = sum(run.over for run in found)
    age = min((run.age for run in found if run.age is not None), default=None)
    if own and own.outcome:
        state = own.outcome
    elif own and own.alive() is False:
        state = "failed"
    else:
        active = {"running", "starting"} & {run.state for run in found}
        state = "running" if active or (own and own.alive()) else "stopped"
    yield Run(
        name,
        path,
        state,
        own,
        done=f"{over}/{max(len(found), len(told))} trials",
        age=age,
        error=own.error if own else None,
    )
    yield from found


def _run(path: str, name: str, sweep: Driver | None, told: dict[str, Any], trial: bool = False) -> Run:
    own, last = driver.read(path), logs.last(path)
    config = files.join(path, "config.yaml")
    train = yaml_text.parse_mapping(files.read_bytes(config), config).get("train") or {}
    steps, step = train.get("steps") or 0, last["step"] if last else 0
    written = files.join(path, logs.FILE) if last else config
    age = max(0.0, time.time() - max(files.modified(written), own.started if own else 0.0))
    seconds = train.get("batch_tokens", 0) / last["tokens_per_s"] if last and last["tokens_per_s"] else 0.0
    limit = max(QUIET_SECONDS, QUIET_LINES * seconds * train.get("log_every", 0))
    state = told.get("state") or ""
    waits = state == "paused" and sweep is not None and sweep.alive() is not False
    if state not in OVER and not waits:
        state = _state(own, sweep, step, steps, age > limit)
    left = max(0.0, (steps - step) * seconds - age) if state == "running" and last else None
    error = told.get("error") or (own.error if own else None)
    return Run(name, path, state, own or sweep, last, f"{step:,}/{steps:,}", left, age, trial, error)


def _state(own: Driver | None, sweep: Driver | None, step: int, steps: int, quiet: bool) -> str:
    if own and own.outcome:
        return own.outcome
    if own is None and step >= steps:
        return "finished"
    who = own or sweep
    if who and who.alive() is False:
        return "failed" if own else "stopped"
    if quiet:
        return "stalled" if own else "stopped"
    return "running" if step else "starting"
