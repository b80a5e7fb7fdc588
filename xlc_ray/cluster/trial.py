"""One trial of a sweep on the cluster: a Trainable of Ray Tune that owns its worker group.

Its own process is rank 0; the others are actors in the trial's placement group, which Tune reserves whole, so that no
trial waits for workers that another half-started trial holds. A trial that is stopped gives all of it back. With
`reuse_actors` the processes stay for the next trial of the same shape, and only what they train is made anew.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import tune
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xlc_ray import files
from xlc_ray.cluster.cli import find_user_error
from xlc_ray.cluster.gauges import Gauges
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Shards
from xlc_ray.sweeps.rank import PREFIX, TrialRank, measured
from xlc_ray.training import Diverged, loop


def bundles(config: Config) -> tune.PlacementGroupFactory:
    """What a trial reserves: a bundle for each rank."""
    cluster = config.cluster
    one = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    return tune.PlacementGroupFactory([one] * (cluster.tensor_parallel * cluster.replicas))


@dataclass(frozen=True)
class Task:
    """A trial, as its ranks are told."""

    config: Config
    stops: tuple[int, ...]
    """Steps at which it is measured, the last one included."""
    predictions: bool
    """Whether the language model's predictions are measured too."""


class Member:
    """One rank of the trial that its process works on."""

    def __init__(self) -> None:
        self.rank: TrialRank | None = None

    def begin(self, task: Task, number: int, world: int, meeting: str | None) -> None:
        """Join the ranks of a trial at the address `meeting` (None: there is just one) and build what is trained."""
        config = task.config
        cluster = config.cluster
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        torch.manual_seed(config.seed)
        device = torch.device("cuda" if cluster.gpus_per_worker else "cpu")
        shards = Shards()
        if meeting:
            backend = "nccl" if cluster.gpus_per_worker else "gloo"
            dist.init_process_group(backend, init_method=meeting, rank=number, world_size=world)
            shards = Shards.of_world(cluster.tensor_parallel, device.type)
        sweep, _, name = config.out.rpartition("/trials/")
        announce = Gauges(f"{files.name(sweep)}/{name}").set if number == 0 else lambda metrics: None
        self.rank = TrialRank(config, task.stops, shards, device, announce, task.predictions)

    def advance(self) -> dict[str, Any]:
        """Train to the next stop. A rank that fails leaves the group, so that the others do not wait for it."""
        assert self.rank is not None
        try:
            return self.rank.advance()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Forget the trial."""
        if self.rank:
            self.rank.close()
        self.rank = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def address(self) -> str:
        """Where the ranks of a trial may meet, if this process is rank 0."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{host}:{free.getsockname()[1]}"


class TrialGroup(tune.Trainable):
    """A step trains to the trial's next stop. `config`: {"name": its name, "task": a Task}."""

    def setup(self, config: dict[str, Any]) -> None:
        self.member, self.others = Member(), []
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up another trial, of the same shape."""
        self._leave()
        self.task: Task = new_config["task"]
        self.begun, self.known = False, []
        return True

    def step(self) -> dict[str, Any]:
        """{"at": step, "found": held-out metrics}, or, of a trial that no retry would save, {"failed": why}."""
        try:
            if not self.begun:
                self._begin()
            at, found = self.known.pop(0) if self.known else self._advance()
        except (Diverged, UserError) as error:
            return {"failed": str(error)}
        return {"at": at, "found": found}

    def _begin(self) -> None:
        config, stops = self.task.config, self.task.stops
        step = loop.prepare(config) or 0
        self.known = [(at, found) for at, found in measured(config.out).items() if at <= step and at in stops]
        self.begun = True
        if step == stops[-1]:
            return
        world = config.cluster.tensor_parallel * config.cluster.replicas
        if len(self.others) != world - 1:
            self.others = [self._worker(number) for number in range(1, world)]
        meeting = self.member.address() if world > 1 else None
        joining = [
            other.begin.remote(self.task, number, world, meeting) for number, other in enumerate(self.others, start=1)
        ]
        self.member.begin(self.task, 0, world, meeting)
        ray.get(joining)

    def _worker(self, number: int) -> Any:
        cluster, reserved = self.task.config.cluster, get_current_placement_group()
        assert reserved is not None, "Tune reserves the bundles of a trial"
        place = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=number)
        actor = ray.remote(Member).options(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, scheduling_strategy=place
        )
        return actor.remote()

    def _advance(self) -> tuple[int, dict[str, float]]:
        training = [other.advance.remote() for other in self.others]
        try:
            line = self.member.advance()
            ray.get(training)
        except Exception as error:
            # The rank that failed first knows why; the others only lost its connection.
            for failure in _failures(training):
                if mistake := find_user_error(failure):
                    raise mistake from error
            raise
        found = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
        return int(line["step"]), found

    def _leave(self) -> None:
        self.member.leave()
        ray.get([other.leave.remote() for other in self.others])

    def cleanup(self) -> None:
        """Give the workers back."""
        self.member.leave()
        for other in self.others:
            ray.kill(other)


def _failures(tasks: list[ray.ObjectRef]) -> list[RayError]:
    found = []
    for task in tasks:
        try:
            ray.get(task, timeout=5)
        except RayError as error:
            found.append(error)
    return found
