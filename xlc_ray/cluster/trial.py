"""A trial of a sweep on the cluster, or several on one stream: a Trainable of Ray Tune that owns its worker group.

Its own process is rank 0; the others are actors in the placement group, which Tune reserves whole, so that no group
waits for workers that another half-started one holds. A group that is stopped gives all of it back. With
`reuse_actors` the processes stay for the next group of the same shape, and only what they train is made anew.

A live source's chunks are made by language models of the group's own, whose room is reserved with the workers': so many
groups run at once as have both. They begin and end with the group's training, at the text where that is.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xlc_ray import files
from xlc_ray.activations.live import LiveStore
from xlc_ray.activations.store import open_source
from xlc_ray.cluster import live
from xlc_ray.cluster.cli import find_user_error
from xlc_ray.cluster.gauges import Gauges
from xlc_ray.cluster.network import listen_on_nodes_interface
from xlc_ray.config import Config, UserError
from xlc_ray.config.sources import LiveSource
from xlc_ray.dictionary import Shards
from xlc_ray.sweeps.rank import Found, Task, TrialRank
from xlc_ray.training import Diverged, loop
from xlc_ray.training.saving import Stop


def bundles(config: Config) -> tune.PlacementGroupFactory:
    """What a trial reserves: a bundle for each rank, and after them one for each language model."""
    cluster = config.cluster

    def bundle(cpus: float, gpus: float) -> dict[str, float]:
        return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})

    rank, model = (
        bundle(cluster.cpus_per_worker, cluster.gpus_per_worker),
        bundle(cluster.cpus_per_model, cluster.gpus_per_model),
    )
    models = cluster.model_actors if isinstance(config.source, LiveSource) else 0
    return tune.PlacementGroupFactory([rank] * _world(config) + [model] * models)


def _world(config: Config) -> int:
    return config.cluster.tensor_parallel * config.cluster.replicas


TRIALS = "trials:"
"""Begins the line of a worker's output that says whose the following lines are."""
ATTEMPT = "1"
"""Generators serve a group once: what is trained anew has others."""
LOST = re.compile("gloo|nccl|connection", re.IGNORECASE)
"""What the error of a collective says whose other end is gone."""


class Member:
    """One rank of the trials that its process works on."""

    def __init__(self) -> None:
        self.rank: TrialRank | None = None

    def begin(self, tasks: Sequence[Task], number: int, world: int, meeting: str | None, generators: Any) -> None:
        """Join the ranks of a group at the address `meeting` (None: there is just one) and prepare what is trained.
        `generators` make the chunks of a live source (None: they are stored)."""
        config = tasks[0].config
        cluster = config.cluster
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        torch.manual_seed(config.seed)
        for output in (sys.stdout, sys.stderr):
            print(TRIALS, *(task.name for task in tasks), file=output, flush=True)
        device = torch.device("cuda" if cluster.gpus_per_worker else "cpu")
        shards = Shards()
        if meeting:
            listen_on_nodes_interface()
            backend = "nccl" if cluster.gpus_per_worker else "gloo"
            dist.init_process_group(backend, init_method=meeting, rank=number, world_size=world)
            shards = Shards.of_world(cluster.tensor_parallel, device.type)
        sweep = files.name(config.out.rpartition("/trials/")[0])
        gauges = {task.name: Gauges(sweep, trial=task.name, rank=number) for task in tasks}

        def announce(name: str, metrics: dict[str, Any]) -> None:
            gauges[name].set(metrics if number == 0 else {})

        batches = None if generators is None else partial(live.live_batches, generators, ATTEMPT)
        self.rank = TrialRank(tasks, shards, device, announce, batches)

    def advance(self, cut: Sequence[str]) -> tuple[int, dict[str, Found | Diverged | Stop]]:
        """Train to the next stop without those that are cut. A rank that fails leaves the group, so that the others do
        not wait for it."""
        assert self.rank is not None
        try:
            self.rank.leave(cut)
            return self.rank.advance()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Forget the trials."""
        if self.rank:
            self.rank.close()
        self.rank = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def address(self) -> str:
        """Where the ranks of a group may meet, if this process is rank 0."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{host}:{free.getsockname()[1]}"


class TrialGroup(tune.Trainable):
    """A step trains to the next stop. `config`: {"tasks": trials that share a stream, "cuts": the actor that knows who
    has left (None: there is one trial, and Tune stops it)}."""

    def setup(self, config: dict[str, Any]) -> None:
        self.member, self.others, self.generators = Member(), [], None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up other trials, of the same shape."""
        self._leave()
        self.tasks: tuple[Task, ...] = new_config["tasks"]
        self.cuts, self.begun = new_config["cuts"], 0.0
        return True

    def step(self) -> dict[str, Any]:
        """{"at": step, "found": [(trial, held-out metrics)], "diverged": [(trial, how)], "stopped": [trial that
        was asked to], "failed": [(trial, why no
        retry would save it)], "apart": whether the trials must be tried one by one, "live": what generators have done
        since "begun"}. Lists, since Tune takes mappings apart."""
        try:
            cut = self._cut()
            if not self.begun:
                self.tasks = tuple(task for task in self.tasks if task.name not in cut)
                self._begin()
            at, said, made = self._advance(cut)
        except UserError as error:
            alone, failed = len(self.tasks) == 1, [(self.tasks[0].name, str(error))]
            return self._said(0, {}, failed if alone else [], not alone, [])
        return self._said(at, said, [], False, made)

    def _said(self, at: int, said: dict[str, Any], failed: list, apart: bool, made: list) -> dict[str, Any]:
        told = {
            "at": at,
            "found": [(name, found) for name, found in said.items() if not isinstance(found, Exception)],
            "diverged": [(name, str(found)) for name, found in said.items() if isinstance(found, Diverged)],
            "stopped": [name for name, found in said.items() if isinstance(found, Stop)],
            "failed": failed,
            "apart": apart,
        }
        return told | {"live": made, "begun": self.begun}

    def _made(self) -> list[tuple[str, int]]:
        """What generators have done. Where all trials have ended they write what is left to write, and rest."""
        if self.generators is None:
            return []
        assert self.member.rank is not None
        ask = self.generators.facts if self.member.rank.names else self.generators.close
        return list(ray.get(ask.remote()).items())

    def _cut(self) -> list[str]:
        return ray.get(self.cuts.among.remote([task.name for task in self.tasks])) if self.cuts else []

    def _begin(self) -> None:
        for task in self.tasks:
            loop.prepare(task.config)
        self.begun = time.time()
        config = max((task.config for task in self.tasks), key=lambda config: config.train.steps)
        world = _world(config)
        if len(self.others) != world - 1:
            self.others = [self._worker(number) for number in range(1, world)]
        meeting = self.member.address() if world > 1 else None
        self.generators = self._generators(config, world)
        joining = [
            other.begin.remote(self.tasks, number, world, meeting, self.generators)
            for number, other in enumerate(self.others, start=1)
        ]
        self.member.begin(self.tasks, 0, world, meeting, self.generators)
        ray.get(joining)

    def _generators(self, config: Config, world: int) -> Any:
        data = open_source(config.source)
        if not isinstance(data, LiveStore):
            return None
        places = [_place(world + number) for number in range(config.cluster.model_actors)]
        return live.start(config, loop.wiring_for(config, data).sites, places)

    def _worker(self, number: int) -> Any:
        cluster, place = self.tasks[0].config.cluster, _place(number)
        actor = ray.remote(Member).options(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, scheduling_strategy=place
        )
        return actor.remote()

    def _advance(self, cut: Sequence[str]) -> tuple[int, dict[str, Found | Diverged | Stop], list[tuple[str, int]]]:
        training = [other.advance.remote(cut) for other in self.others]
        for rank in training:
            rank.future().add_done_callback(self._came)
        try:
            at, said = self.member.advance(cut)
            ray.get(training)
            return at, said, self._made()
        except Exception as error:
            self._end_generators()
            failures = error, *_failures(training)
            for failure in failures:
                if mistake := find_user_error(failure):
                    raise UserError(str(mistake)) from error
            if (why := cause(failures)) is not error:
                raise why from error
            raise

    def _came(self, rank: Future) -> None:
        if rank.exception():  # what it has not read would stay held, and others wait for room for ever
            self._end_generators()

    def _leave(self) -> None:
        self._end_generators()
        self.member.leave()
        ray.get([other.leave.remote() for other in self.others])

    def cleanup(self) -> None:
        """Give the workers back."""
        self._end_generators()
        self.member.leave()
        for other in self.others:
            ray.kill(other)

    def _end_generators(self) -> None:
        """First of all: what waits for a chunk then waits no more."""
        ended, self.generators = self.generators, None
        if ended is not None:
            ray.kill(ended)  # and with them their language models


def _place(bundle: int) -> PlacementGroupSchedulingStrategy:
    reserved = get_current_placement_group()
    assert reserved is not None, "Tune reserves the bundles of a trial"
    return PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=bundle)


def cause(failures: Sequence[Exception]) -> Exception:
    """Of what ranks failed with, what says why: the rank that failed first knows, the others lost its connection."""

    def lost(error: Exception) -> bool:
        return not isinstance(error, RayActorError) and LOST.search(str(error).strip().rpartition("\n")[-1]) is not None

    return min(failures, key=lost)


def _failures(tasks: list[ray.ObjectRef]) -> list[RayError]:
    found = []
    for task in tasks:
        try:
            ray.get(task, timeout=5)
        except RayError as error:
            found.append(error)
    return found
