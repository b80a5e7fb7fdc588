"""Sweeps as a job: trials under Ray Tune, each a worker group of its own, judged at rungs by a board in the driver."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from xlc_ray import files
from xlc_ray.cluster.session import connect, output_root, require, resolve, run_path
from xlc_ray.cluster.train import open_or_make
from xlc_ray.cluster.trial import Task, TrialGroup, bundles
from xlc_ray.config import Config, UserError, yaml_text
from xlc_ray.config.sweep import SweepConfig, read_tree, sweep_of
from xlc_ray.sweeps import grids
from xlc_ray.sweeps.asha import rungs
from xlc_ray.sweeps.board import Board, read_rows
from xlc_ray.sweeps.local import run_trial
from xlc_ray.sweeps.rank import PREDICTED
from xlc_ray.sweeps.result import Sweep
from xlc_ray.sweeps.search import Search, make_search
from xlc_ray.sweeps.space import Trial, corners, flatten, settings_of, trials
from xlc_ray.sweeps.table import Table
from xlc_ray.training import loop

SETTINGS = "sweep.yaml"
FREE = ("search.max_concurrent", "search.max_trials", "search.num_samples", "resources", "base.cluster", "base.out")
"""Settings that may differ when a sweep goes on."""


def sweep(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    local: bool = False,
    resume: str | None = None,
) -> Sweep:
    """Run the trials of a sweep's YAML, or go on with the sweep in the directory `resume`.

    `overrides`: {dotted path: value}, of the sweep's settings. `limit`: only the first so many trials. `local`: one
    after another in this process. The same call again goes on too; trials that finished or were cut are kept, failed
    ones are tried again. Raises UserError where settings, store or cluster do not allow it; a trial that fails does not
    end the others.
    """
    settings, listed = plan(path, overrides, limit, resume)
    board = Board(settings, Table())
    search = make_search(settings, listed, board, read_rows(settings.out))
    known = listed or corners(settings)
    if not local:
        connect()
        largest = max(known, key=lambda trial: trial.cpus), max(known, key=lambda trial: trial.gpus)
        for trial in largest:
            require(trial.cpus, trial.gpus, f"trial {trial.name}")
    _check(settings, [trial.config for trial in known])
    _keep(settings)
    board.write()
    if local:
        while trial := search.next():
            run_trial(board, trial)
            search.tell(board.rows[trial.name])
    elif search.left:
        _run(settings, board, search, _at_once(settings, known))
    board.write()
    board.write_metrics()
    return Sweep(settings.out)


def plan(
    path: str | Path | None, overrides: Mapping[str, Any] | None, limit: int | None, resume: str | None
) -> tuple[SweepConfig, list[Trial]]:
    """The settings, with absolute paths, and the trials of a grid or random search. Every corner has been validated."""
    if (path is None) == (resume is None):
        raise UserError("--config: give either --config FILE or --resume DIR")
    file = files.join(run_path(resume), SETTINGS) if resume else str(path)
    if resume and not files.exists(file):
        raise UserError(f"{resume}: no {SETTINGS} here; expected the directory of a sweep")
    tree = yaml_text.parse_mapping(files.read_bytes(file), file) if resume else read_tree(file)
    given = dict(overrides or {})
    if grids.is_grid(tree):
        tree = _from_grid(tree, file, given)
    if limit is not None:
        given["search.max_trials"] = limit
    settings = sweep_of(tree, file, given)
    out = settings.out if files.is_url(settings.out) else str(output_root() / Path(settings.out).expanduser())
    settings = settings.model_copy(update={"out": out, "base": resolve(settings.base.override({"out": out}))})
    if settings.search.kind != "grid":
        corners(settings)
    return settings, trials(settings)


def _from_grid(tree: dict[str, Any], file: str, given: dict[str, Any]) -> dict[str, Any]:
    """A sweep of ours from a grid file, whose base and directory are given as overrides."""
    if missing := [name for name in ("base", "out") if name not in given]:
        raise UserError(
            f"{missing[0]}: missing; a grid file needs --base=FILE.yaml, the settings it varies, and --out=DIR"
        )
    plain = {path: value for path, value in given.items() if path.startswith(("base", "override."))}
    any_axis = {"space": {"seed": {"choice": [0]}}, "out": given["out"]}
    return grids.sections(tree, sweep_of(any_axis, file, plain).base, file)


def dry_run(
    path: str | Path | None, overrides: Mapping[str, Any] | None, limit: int | None, resume: str | None
) -> Iterator[str]:
    """Lines: every trial's settings and what it takes of the cluster (of an Optuna search: every corner's)."""
    settings, listed = plan(path, overrides, limit, resume)
    known = listed or corners(settings)
    for trial in known:
        taken = f"{trial.workers} worker{'s' * (trial.workers > 1)}, {trial.cpus:g} CPU"
        taken += f", {trial.gpus:g} GPU" if trial.gpus else ""
        values = ", ".join(f"{path}={value}" for path, value in settings_of(trial.changes).items())
        yield f"{trial.name}   {taken}   {values}"
    steps = sum(trial.config.train.steps for trial in known)
    stops = rungs(settings.asha, settings.base.train.steps)
    cut = f", cut at {', '.join(f'{rung:,}' for rung in stops)}" if stops else ""
    if listed:
        yield f"{len(listed)} trials, {steps:,} steps if none is cut short{cut}; nothing was started"
    else:
        yield f"{settings.search.num_samples} trials between these {len(known)} corners{cut}; nothing was started"


def _check(settings: SweepConfig, configs: list[Config]) -> None:
    """Open, make or verify each store once, and see that all trials find in it what they are measured on."""
    stores: dict[str, Any] = {}
    for config in configs:
        if settings.search.metric in PREDICTED and config.cluster.tensor_parallel > 1:
            raise UserError(
                f"search.metric: {settings.search.metric} needs each dictionary whole in one process; set "
                "cluster.tensor_parallel: 1, or choose frontier"
            )
        path = config.source.path
        if path not in stores:
            stores[path] = open_or_make(config)
            if not files.exists(files.join(path, "held_out")):
                raise UserError(f"source.path: {path} has no held-out part, which sweeps measure trials on")
            if config.source.verify:
                stores[path].verify()
        loop.wiring_for(config, stores[path])


def _keep(settings: SweepConfig) -> None:
    """Write sweep.yaml. Raises UserError where the directory holds another sweep."""
    path = files.join(settings.out, SETTINGS)
    if files.exists(path):
        before = _decisive(yaml_text.parse_mapping(files.read_bytes(path), path))
        now = _decisive(yaml_text.parse_mapping(settings.yaml().encode(), path))
        if changed := next((key for key in before | now if before.get(key) != now.get(key)), None):
            raise UserError(
                f"{settings.out}: holds a sweep with other settings ({changed}: {before.get(changed)!r}, now "
                f"{now.get(changed)!r}); choose another --out"
            )
    files.write_bytes(path, settings.yaml().encode())


def _decisive(tree: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in flatten(tree).items() if not path.startswith(FREE)}


def _at_once(settings: SweepConfig, known: list[Trial]) -> int | None:
    """Trials at once that `search.max_concurrent` and `resources` allow; None: as many as the cluster holds."""
    limits = [settings.search.max_concurrent] if settings.search.max_concurrent else []
    for kind, most in (("cpus", settings.resources.cpus), ("gpus", settings.resources.gpus)):
        largest = max(getattr(trial, kind) for trial in known)
        if most is not None and largest > most + 1e-9:
            raise UserError(f"resources.{kind}: {most:g}, but a trial takes {largest:g}")
        if most is not None and largest:
            limits.append(int(most / largest + 1e-9))
    return min(limits, default=None)


def _run(settings: SweepConfig, board: Board, search: Search, at_once: int | None) -> None:
    """All trials that are left, under Ray Tune."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # own gates are modules in the working directory
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials write their own metrics
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C stays a KeyboardInterrupt
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the board says which failed
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner no verbosity silences
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(TrialGroup, lambda config: bundles(config["task"].config)),
        tune_config=tune.TuneConfig(
            search_alg=_Next(search, board),
            scheduler=_Rungs(board),
            num_samples=search.left,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=settings.out,
            failure_config=tune.FailureConfig(max_failures=settings.base.cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[_Watch(board)],
            verbose=0,
        ),
    )
    tuner.fit()


class _Kept:
    """Tune pickles what it is given, for a resuming of its own that we do not use: nothing of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Next(_Kept, Searcher):
    """Tune asks this for trials."""

    def __init__(self, search: Search, board: Board):
        super().__init__()
        self.search, self.board, self.names = search, board, {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if (trial := self.search.next()) is None:
            return Searcher.FINISHED
        self.names[trial_id] = trial.name
        task = Task(trial.config, self.board.stops(trial), self.board.predictions)
        return {"name": trial.name, "task": task}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.search.tell(self.board.rows[self.names[trial_id]])


class _Rungs(_Kept, FIFOScheduler):
    """Tune asks this whether a trial goes on."""

    def __init__(self, board: Board):
        super().__init__()
        self.board = board

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if "failed" in result:
            self.board.failed(name, result["failed"])
            return TrialScheduler.STOP
        found = {key.removeprefix("found/"): value for key, value in result.items() if key.startswith("found/")}
        on = self.board.reached(name, result["at"], found)
        return TrialScheduler.CONTINUE if on else TrialScheduler.STOP


class _Watch(_Kept, tune.Callback):
    """Tune tells this which trials start and which are given up."""

    def __init__(self, board: Board):
        self.board = board

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self.board.started(trial.config["name"])

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        said = str(trial.get_error() or "its workers died")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        self.board.failed(trial.config["name"], lines[-1])
