"""A trial of a sweep on the cluster, or several on one stream: a Trainable of Ray Tune that owns its worker group.

Its own process is rank 0; the others are actors in the placement group, which Tune reserves whole, so that no group
waits for workers that another half-started one holds. A group that is stopped gives all of it back. With
`reuse_actors` the processes stay for the next group of the same shape, and only what they train is made anew.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
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
from xlc_ray.cluster.network import listen_on_nodes_interface
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Shards
from xlc_ray.sweeps.rank import Found, Task, TrialRank
from xlc_ray.training import Diverged, loop


def bundles(config: Config) -> tune.PlacementGroupFactory:
    """What a trial reserves: a bundle for each rank."""
    cluster = config.cluster
    one = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    return tune.PlacementGroupFactory([one] * (cluster.tensor_parallel * cluster.replicas))


class Member:
    """One rank of the trials that its process works on."""

    def __init__(self) -> None:
        self.rank: TrialRank | None = None

    def begin(self, tasks: Sequence[Task], number: int, world: int, meeting: str | None) -> None:
        """Join the ranks of a group at the address `meeting` (None: there is just one) and prepare what is trained."""
        config = tasks[0].config
        cluster = config.cluster
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
        torch.manual_seed(config.seed)
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

        self.rank = TrialRank(tasks, shards, device, announce)

    def advance(self, cut: Sequence[str]) -> tuple[int, dict[str, Found | Diverged]]:
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
        self.member, self.others = Member(), []
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up other trials, of the same shape."""
        self._leave()
        self.tasks: tuple[Task, ...] = new_config["tasks"]
        self.cuts, self.begun = new_config["cuts"], False
        return True

    def step(self) -> dict[str, Any]:
        """{"at": step, "found": [(trial, held-out metrics)], "diverged": [(trial, how)], "failed": [(trial, why no
        retry would save it)], "apart": whether trials must be tried one by one}. Lists: Tune takes mappings apart."""
        try:
            cut = self._cut()
            if not self.begun:
                self.tasks = tuple(task for task in self.tasks if task.name not in cut)
                self._begin()
            at, said = self._advance(cut)
        except UserError as error:
            alone = len(self.tasks) == 1
            failed = [(self.tasks[0].name, str(error))] * alone
            return {"at": 0, "found": [], "diverged": [], "failed": failed, "apart": not alone}
        diverged = [(name, str(found)) for name, found in said.items() if isinstance(found, Diverged)]
        found = [(name, found) for name, found in said.items() if not isinstance(found, Diverged)]
        return {"at": at, "found": found, "diverged": diverged, "failed": [], "apart": False}

    def _cut(self) -> list[str]:
        return ray.get(self.cuts.among.remote([task.name for task in self.tasks])) if self.cuts else []

    def _begin(self) -> None:
        for task in self.tasks:
            loop.prepare(task.config)
        self.begun = True
        config = self.tasks[0].config
        world = config.cluster.tensor_parallel * config.cluster.replicas
        if len(self.others) != world - 1:
            self.others = [self._worker(number) for number in range(1, world)]
        meeting = self.member.address() if world > 1 else None
        joining = [
            other.begin.remote(self.tasks, number, world, meeting) for number, other in enumerate(self.others, start=1)
        ]
        self.member.begin(self.tasks, 0, world, meeting)
        ray.get(joining)

    def _worker(self, number: int) -> Any:
        cluster, reserved = self.tasks[0].config.cluster, get_current_placement_group()
        assert reserved is not None, "Tune reserves the bundles of a trial"
        place = PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=number)
        actor = ray.remote(Member).options(
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker, scheduling_strategy=place
        )
        return actor.remote()

    def _advance(self, cut: Sequence[str]) -> tuple[int, dict[str, Found | Diverged]]:
        training = [other.advance.remote(cut) for other in self.others]
        try:
            said = self.member.advance(cut)
            ray.get(training)
        except Exception as error:
            # The rank that failed first knows why; the others only lost its connection.
            for failure in _failures(training):
                if mistake := find_user_error(failure):
                    raise mistake from error
            raise
        return said

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
