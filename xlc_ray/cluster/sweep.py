"""Sweeps as a job: what is checked before, which trials train together, and what is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from xlc_ray import files
from xlc_ray.activations.store import Store, is_there
from xlc_ray.cluster import live_sweep
from xlc_ray.cluster.driver import driving
from xlc_ray.cluster.placement import capacity, nodes_now, one_by_one
from xlc_ray.cluster.session import connect, output_path, require, resolve, run_path
from xlc_ray.cluster.train import open_or_make
from xlc_ray.cluster.tuning import run_trials
from xlc_ray.config import UserError, yaml_text
from xlc_ray.config.sweep import SweepConfig, read_tree, sweep_of
from xlc_ray.sweeps import grids
from xlc_ray.sweeps.asha import rungs
from xlc_ray.sweeps.board import Board, read_rows
from xlc_ray.sweeps.generations import Generations
from xlc_ray.sweeps.local import run_group
from xlc_ray.sweeps.pbt import replaced, stops
from xlc_ray.sweeps.rank import PREDICTED
from xlc_ray.sweeps.result import Sweep
from xlc_ray.sweeps.search import Listed, Proposals, Search
from xlc_ray.sweeps.space import INDIFFERENT, Trial, corners, flatten, least, settings_of, trials, within
from xlc_ray.sweeps.table import Table
from xlc_ray.training import together

SETTINGS = "sweep.yaml"
REPORT = "report.html"
FREE = ("search.max_concurrent", "search.max_trials", "search.num_samples", "share_activations", "resources", "out",
        "base.cluster", *(f"base.{path}" for path in INDIFFERENT))  # fmt: skip
"""Settings that may differ when a sweep goes on."""
POPULATION = ("search.max_trials", "search.num_samples")
"""But not these where trials are a population: who is replaced depends on all."""


def sweep(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    local: bool = False,
    resume: str | None = None,
) -> Sweep:
    """Run the trials of a sweep's YAML, or go on with the sweep in the directory `resume`.

    `overrides`: {dotted path: value}, of the sweep's settings. `limit`: only the first so many trials, this time.
    `local`: one after another, or those of a stream together, in this process. The same call again goes on too; what
    finished or was cut is kept, what failed is tried again. Raises UserError where settings, store or cluster do not
    allow it; a trial that fails does not end the others.
    """
    settings, listed = plan(path, overrides, limit, resume)
    _same(settings)
    board = Board(settings, Table())
    search = _search(settings, listed, board, limit)
    known = listed or corners(settings)
    if local:
        live_sweep.refuse_locally(known)
    else:
        connect()
        _find_room(known)
    streams, held = _check(settings, known, local)
    size = 1
    if isinstance(search, Listed) and settings.share_activations:
        size = search.share(
            lambda trial: streams[trial.name], settings.resources.sharing, settings.search.max_concurrent
        )
    files.write_bytes(files.join(settings.out, SETTINGS), settings.yaml().encode())
    board.write()
    with nullcontext() if local else driving(settings.out):
        if local:
            _run_here(board, search)
        elif search.left:
            run_trials(settings, board, search, _at_once(settings, known, size, held))
            live_sweep.complete_tees(known)
        board.write()
        board.write_metrics()
    found = Sweep(settings.out)
    found.plot(files.join(settings.out, REPORT))
    return found


def _search(settings: SweepConfig, listed: list[Trial], board: Board, limit: int | None) -> Search:
    """Going on from the rows of an earlier session. Puts what is known on the board."""
    before = read_rows(settings.out)
    if settings.pbt:
        search: Search = Generations(settings, listed, board, before)
    elif settings.search.kind == "optuna":
        search = Proposals(settings, board, before, limit)
    else:
        search = Listed(listed, board, before)
    board.keep(before)
    return search


def _run_here(board: Board, search: Search) -> None:
    while group := search.next():
        run_group(board, group)
        for trial in group:
            search.tell(board.rows[trial.name])


def plan(
    path: str | Path | None, overrides: Mapping[str, Any] | None, limit: int | None, resume: str | None
) -> tuple[SweepConfig, list[Trial]]:
    """The settings, with absolute paths, and the first `limit` trials of a grid or random search. Every corner has been
    validated. Of a population `limit` is a setting, max_trials: who is replaced depends on all."""
    if (path is None) == (resume is None):
        raise UserError("--config: give either --config FILE or --resume DIR")
    file = files.join(run_path(resume), SETTINGS) if resume else str(path)
    if resume and not files.exists(file):
        raise UserError(f"{resume}: no {SETTINGS} here; expected the directory of a sweep")
    tree = yaml_text.parse_mapping(files.read_bytes(file), file) if resume else read_tree(file)
    given = ({"out": run_path(resume)} if resume else {}) | dict(overrides or {})  # it may have been moved
    if grids.is_grid(tree):
        tree = _from_grid(tree, file, given)
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit} trials; allowed: 1 and more")
    settings = sweep_of(tree, file, given)
    if settings.pbt:
        kept = settings.search.model_copy(update={"max_trials": least(settings.search.max_trials, limit)})
        settings = settings.model_copy(update={"search": kept})
    out = output_path(settings.out)
    settings = settings.model_copy(update={"out": out, "base": resolve(settings.base.override({"out": out}))})
    if settings.search.kind != "grid" or settings.pbt:
        corners(settings)
    found = trials(settings, limit)
    if settings.pbt:
        replaced(settings.pbt.quantile, len(found))
    return settings, found


def _from_grid(tree: dict[str, Any], file: str, given: dict[str, Any]) -> dict[str, Any]:
    """A sweep of ours from a grid file, whose base and directory are given as overrides."""
    if missing := [name for name in ("base", "out") if name not in given]:
        raise UserError(
            f"{missing[0]}: missing; a grid file needs --base=FILE.yaml, the settings it varies, and --out=DIR"
        )
    plain = {path: value for path, value in given.items() if path.startswith(("base", "override."))}
    if grids.NAME in tree:
        print(f"{file}: {grids.NAME} sets nothing: trials are named by what differs", flush=True)
    any_axis = {"space": {"seed": {"choice": [0]}}, "out": given["out"]}
    return grids.sections(tree, sweep_of(any_axis, file, plain).base, file)


def dry_run(
    path: str | Path | None, overrides: Mapping[str, Any] | None, limit: int | None, resume: str | None
) -> Iterator[str]:
    """Lines: every trial's settings and what it takes of the cluster (of an Optuna search: every corner's)."""
    settings, listed = plan(path, overrides, limit, resume)
    known = listed or corners(settings)
    for trial in known:
        taken = f"{trial.workers} worker{'s' * (trial.workers > 1)}"
        taken += f" and {_models(trial)}, {trial.cpus:g} CPU" if trial.models else f", {trial.cpus:g} CPU"
        taken += f", {trial.gpus:g} GPU" if trial.gpus else ""
        values = ", ".join(f"{path}={value}" for path, value in settings_of(trial.changes).items())
        yield f"{trial.name}   {taken}   {values}"
    steps = sum(trial.config.train.steps for trial in known)
    last = settings.base.train.steps
    at = ", ".join(f"{step:,}" for step in stops(settings.pbt, last) or rungs(settings.asha, last))
    cut = f", cut at {at}" if at else ""
    if settings.pbt:
        most = replaced(settings.pbt.quantile, len(listed))
        yield f"{len(listed)} trials, {steps:,} steps, up to {most} of them replaced at {at}; nothing was started"
    elif listed:
        yield f"{len(listed)} trials, {steps:,} steps if none is cut short{cut}; nothing was started"
    else:
        count = least(settings.search.num_samples, settings.search.max_trials, limit)
        yield f"{count} trials between these {len(known)} corners{cut}; nothing was started"


def _models(trial: Trial) -> str:
    return f"{trial.models} language model{'s' * (trial.models > 1)}"


def _check(settings: SweepConfig, known: list[Trial], local: bool) -> tuple[dict[str, Hashable], int | None]:
    """Open, make or verify each store once, and see that all trials find in it what they are measured on. What each
    of them reads (`together.stream`), and how many groups of live trials may be at once."""
    stores: dict[str, Store] = {}
    streams: dict[str, Hashable] = {}
    for trial in known:
        config = trial.config
        if not local and settings.search.metric in PREDICTED and config.cluster.tensor_parallel > 1:
            raise UserError(
                f"search.metric: {settings.search.metric} needs each dictionary whole in one process; set "
                "cluster.tensor_parallel: 1, run it with --local, or choose frontier"
            )
        path = config.source.path
        if path not in stores:
            stores[path] = open_or_make(config)
            if not is_there(files.join(path, "held_out")):
                raise UserError(f"source.path: {path} has no held-out part, which sweeps measure trials on")
            if config.source.verify:
                stores[path].verify()
        streams[trial.name] = together.stream(config, stores[path])
    return streams, live_sweep.check(known, stores) if any(trial.models for trial in known) else None


def _find_room(known: list[Trial]) -> None:
    """Raise UserError where the cluster cannot hold a trial: Ray would wait for it in silence."""
    largest = max(known, key=lambda trial: trial.cpus), max(known, key=lambda trial: trial.gpus)
    for trial in largest:
        models = f" with {_models(trial)}" if trial.models else ""
        require(trial.cpus, trial.gpus, f"trial {trial.name}{models}")
    nodes = nodes_now(free=False)
    for trial in known:
        cluster = trial.config.cluster
        if one_by_one(trial.workers, nodes, cluster) is None:
            raise UserError(
                f"cluster: trial {trial.name} needs {trial.workers} workers of {cluster.cpus_per_worker:g} CPUs and "
                f"{cluster.gpus_per_worker:g} GPUs, each on one node, and the nodes have room for "
                f"{', '.join(str(capacity(node, cluster)) for node in nodes)}; lower the settings under cluster, or "
                "add nodes"
            )


def _same(settings: SweepConfig) -> None:
    """Raise UserError where the directory holds another sweep."""
    path = files.join(settings.out, SETTINGS)
    if not files.exists(path) and files.exists(files.join(settings.out, "config.yaml")):
        raise UserError(f"{settings.out}: holds a run; choose another --out")
    if files.exists(path):
        free = tuple(name for name in FREE if not (settings.pbt and name in POPULATION))
        before = _decisive(yaml_text.parse_mapping(files.read_bytes(path), path), free)
        now = _decisive(yaml_text.parse_mapping(settings.yaml().encode(), path), free)
        if changed := next((key for key in before | now if before.get(key) != now.get(key)), None):
            raise UserError(
                f"{settings.out}: holds a sweep with other settings ({changed}: {before.get(changed)!r}, now "
                f"{now.get(changed)!r}); choose another --out"
            )


def _decisive(tree: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    return {path: value for path, value in flatten(tree).items() if not within(path, free)}


def _at_once(settings: SweepConfig, known: list[Trial], size: int, held: int | None) -> int | None:
    """Worker groups, of up to `size` trials, at once that `search.max_concurrent` and `resources` allow, and of whose
    chunks the object stores have room (`held`); None: as many as the cluster holds."""
    limits = [max(1, settings.search.max_concurrent // size)] if settings.search.max_concurrent else []
    limits += [held] if held else []
    for kind, most in (("cpus", settings.resources.cpus), ("gpus", settings.resources.gpus)):
        largest = max(getattr(trial, kind) for trial in known)
        if most is not None and largest > most + 1e-9:
            raise UserError(f"resources.{kind}: {most:g}, but a trial takes {largest:g}")
        if most is not None and largest:
            limits.append(int(most / largest + 1e-9))
    return min(limits, default=None)
