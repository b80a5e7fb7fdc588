"""Trials under Ray Tune, which places them and calls; what comes next and what goes on is the search's and the board's.

What Tune calls a trial is a worker group here: of one trial, or of several that share a stream. Of those some may be
cut while the others go on, so that the group asks (cuts.py) who has left. A group that cannot go on parts: each of its
trials goes on from its last checkpoint in workers of its own, and only the one whose fault it was fails.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xlc_ray.cluster.cuts import Cuts
from xlc_ray.cluster.session import storage
from xlc_ray.cluster.trial import TrialGroup, bundles
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.sweeps.board import Board
from xlc_ray.sweeps.search import Group, Listed, Search


def run_trials(settings: SweepConfig, board: Board, search: Search, at_once: int | None) -> None:
    """All trials that are left, in at most `at_once` worker groups at a time."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # own gates are modules in the working directory
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # trials write their own metrics
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C stays a KeyboardInterrupt
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # the board says which failed
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner no verbosity silences
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    groups = _Groups(board, _start_cuts() if settings.share_activations else None)
    tuner = tune.Tuner(
        tune.with_resources(TrialGroup, lambda config: bundles(config["tasks"][0].config)),
        tune_config=tune.TuneConfig(
            search_alg=_Next(search, groups),
            scheduler=_Rungs(groups),
            num_samples=2 * search.left,  # at most: each may come once more, by itself
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            **storage(settings.out),
            failure_config=tune.FailureConfig(max_failures=settings.base.cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[_Watch(groups)],
            verbose=0,
        ),
    )
    tuner.fit()
    if groups.live:
        made, read = (sum(facts[name] for facts in groups.live.values()) for name in ("made", "read"))
        print(f"live      {made:,} chunks made by language models, {read:,} read", flush=True)


def _start_cuts() -> Any:
    here = ray.get_runtime_context().get_node_id()  # it may not go before the driver does
    place = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    return ray.remote(Cuts).options(num_cpus=0, scheduling_strategy=place).remote()


class _Kept:
    """Tune pickles what it is given, for a resuming of its own that we do not use: nothing of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Groups(_Kept):
    """The worker groups, by Tune's ids."""

    def __init__(self, board: Board, cuts: Any):
        """`cuts`: the actor of that name; None where no group has more than one trial."""
        self.board, self.cuts = board, cuts
        self.running: dict[str, Group] = {}
        self.live: dict[tuple[str, float], dict[str, int]] = {}
        """What generators had done at a group's last stop, by group and when it began."""

    def begin(self, id: str, group: Group) -> Any:
        """A group will have workers: what it asks for who has left; None where nobody can leave before the others."""
        self.running[id] = group
        if len(group) == 1:
            return None
        ray.get(self.cuts.forget.remote([trial.name for trial in group]))
        return self.cuts

    def cut(self, names: list[str]) -> None:
        """Before the next step these leave their group."""
        if self.cuts is not None:
            ray.get(self.cuts.add.remote(names))

    def left(self, id: str) -> list[str]:
        """Trials of a group that still train."""
        return self.board.left(trial.name for trial in self.running[id])

    def may_part(self) -> bool:
        """Whether a group runs whose trials may yet come again by themselves."""
        return any(len(group) > 1 for group in self.running.values())


class _Next(_Kept, Searcher):
    """Tune asks this for groups, and says when they end."""

    def __init__(self, search: Search, groups: _Groups):
        super().__init__()
        self.search, self.groups = search, groups

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if (group := self.search.next()) is None:
            return None if self.search.left or self.groups.may_part() else Searcher.FINISHED
        cuts = self.groups.begin(trial_id, group)
        name = group[0].name if len(group) == 1 else f"{group[0].name}+{len(group) - 1}"
        return {"name": name, "tasks": tuple(map(self.groups.board.task, group)), "cuts": cuts}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        left = self.groups.left(trial_id)
        group = self.groups.running.pop(trial_id)
        if len(group) > 1 and left:
            assert isinstance(self.search, Listed), "what is chosen one by one does not share"
            for name in left:
                self.groups.board.waits(name)
            self.search.part(trial for trial in group if trial.name in left)
        for trial in group:
            if len(group) == 1 or trial.name not in left:
                self.search.tell(self.groups.board.rows[trial.name])


class _Rungs(_Kept, FIFOScheduler):
    """Tune asks this whether a group goes on."""

    def __init__(self, groups: _Groups):
        super().__init__()
        self.groups = groups

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        board, found = self.groups.board, dict(result["found"])
        if result["live"]:
            self.groups.live[trial.trial_id, result["begun"]] = dict(result["live"])
        if result["apart"]:
            return TrialScheduler.STOP
        for name, why in result["failed"]:
            board.failed(name, why)
        for name, how in result["diverged"]:
            board.diverged(name, how)
        for name in result["stopped"]:
            board.asked_to_stop(name, result["at"])
        on = board.reached(result["at"], found)
        came = [*found, *dict(result["failed"]), *dict(result["diverged"])]
        self.groups.cut([name for name in came if name not in on])
        return TrialScheduler.CONTINUE if self.groups.left(trial.trial_id) else TrialScheduler.STOP


class _Watch(_Kept, tune.Callback):
    """Tune tells this which groups start and which are given up."""

    def __init__(self, groups: _Groups):
        self.groups = groups

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        for name in self.groups.left(trial.trial_id):
            self.groups.board.started(name)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        tasks = trial.config["tasks"]
        if len(tasks) == 1:
            said = str(trial.get_error() or "its workers died")
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            self.groups.board.failed(tasks[0].name, lines[-1])
