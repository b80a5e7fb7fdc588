"""Which layout of a run the nodes have room for, and on which node each of its workers goes.

A layout is tensor_parallel × replicas workers, a group of tensor_parallel workers being a replica. Pure functions of
what the nodes have; only `nodes_now` asks the cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node  # Ray tells what is free by node nowhere else

from xlc_ray.config import Cluster, Config, UserError
from xlc_ray.config.sources import LiveSource

FULL = 1e-9  # fractions of CPUs add up to a whole only nearly


@dataclass(frozen=True)
class Layout:
    """So many ranks a replica, and so many replicas."""

    tensor_parallel: int
    replicas: int

    @property
    def workers(self) -> int:
        """All ranks."""
        return self.tensor_parallel * self.replicas

    def __str__(self) -> str:
        return f"{self.replicas} x {self.tensor_parallel} workers"


@dataclass(frozen=True)
class Node:
    """A node that is alive: its id, its address, and CPUs and GPUs, all of them or those that are free."""

    id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Place:
    """A layout, and the id of the node of each worker. Workers of a node stand together, those of a replica too."""

    layout: Layout
    nodes: tuple[str, ...]


def layouts(config: Config) -> list[Layout]:
    """What the settings allow, the wanted one first: fewer replicas, then fewer or other ranks a replica.

    Replicas divide the batch, so that every layout takes the same steps on the same rows."""
    cluster, train = config.cluster, config.train
    least = cluster.min_replicas or cluster.replicas
    replicas = [r for r in range(cluster.replicas, least - 1, -1) if train.batch_tokens % (r * train.accumulate) == 0]
    ranks = dict.fromkeys((cluster.tensor_parallel, *cluster.fallback_tensor_parallel))
    return [Layout(t, r) for t in ranks for r in replicas]


def least_models(config: Config) -> int:
    """Language models that a run cannot do without."""
    return int(isinstance(config.source, LiveSource))


def best(config: Config, nodes: Sequence[Node], models: int = 0) -> Place | None:
    """The first layout that the nodes have room for, beside so many language models; None where there is room for
    none."""
    for layout in layouts(config):
        found = place(layout, nodes, config.cluster)
        if found and room_for_models(beside(found, nodes, config.cluster), config.cluster) >= models:
            return Place(layout, found)
    return None


def beside(workers: Sequence[str], nodes: Sequence[Node], cluster: Cluster) -> list[Node]:
    """What workers on these nodes leave of them."""
    return with_own(nodes, {node: -count for node, count in Counter(workers).items()}, cluster)


def room_for_models(nodes: Sequence[Node], cluster: Cluster) -> int:
    """Language models that find room, each on one node."""
    return sum(_times(node, cluster.cpus_per_model, cluster.gpus_per_model) for node in nodes)


def require_model(cluster: Cluster, what: str) -> None:
    """Check that a node of the cluster holds what a language-model actor takes, since Ray would wait for one in
    silence. Raises UserError with what the nodes have."""
    nodes = nodes_now(free=False)
    if not room_for_models(nodes, cluster):
        raise UserError(
            f"cluster: {what} needs {cluster.cpus_per_model:g} CPUs and {cluster.gpus_per_model:g} GPUs of one node; "
            f"the nodes have {', '.join(f'{node.cpus:g} and {node.gpus:g}' for node in nodes)}; lower "
            "cluster.cpus_per_model or cluster.gpus_per_model, or add nodes"
        )


def place(layout: Layout, nodes: Sequence[Node], cluster: Cluster) -> tuple[str, ...] | None:
    """A node for each worker, or None where there is no room.

    A replica goes to one node: `spread` takes the node with the fewest replicas, `pack` the one with the least room.
    Only with `any` may a replica span nodes, where no node has room for a whole one."""
    room = {node.id: capacity(node, cluster) for node in nodes}
    held = dict.fromkeys(room, 0)
    for _ in range(layout.replicas):
        fitting = [n for n in room if room[n] >= layout.tensor_parallel]
        if fitting and cluster.placement == "spread":
            taken = [min(fitting, key=lambda n: (held[n], -room[n]))] * layout.tensor_parallel
        elif fitting:
            taken = [min(fitting, key=lambda n: room[n])] * layout.tensor_parallel
        elif cluster.placement == "any" and sum(room.values()) >= layout.tensor_parallel:
            widest = sorted(room, key=lambda n: -room[n])
            taken = [n for n in widest for _ in range(room[n])][: layout.tensor_parallel]
        else:
            return None
        for n in taken:
            room[n] -= 1
            held[n] += 1
    return tuple(n for n, count in held.items() for _ in range(count))


def one_by_one(workers: int, nodes: Sequence[Node], cluster: Cluster) -> Place | None:
    """A node for each worker, on as few as can be, whatever `cluster.placement` says of replicas: as a trial of a sweep
    reserves them. None where there is no room."""
    layout = Layout(1, workers)
    found = place(layout, nodes, cluster.model_copy(update={"placement": "pack"}))
    return Place(layout, found) if found else None


def capacity(node: Node, cluster: Cluster) -> int:
    """Workers that find room on a node."""
    return _times(node, cluster.cpus_per_worker, cluster.gpus_per_worker)


def _times(node: Node, cpus: float, gpus: float) -> int:
    found = int(node.cpus / cpus + FULL)
    return min(found, _on_gpus(node.gpus, gpus)) if gpus else found


def _on_gpus(gpus: float, each: float) -> int:
    # Ray gives a process whole GPUs, or a part of one.
    if each >= 1:
        return int(gpus / each + FULL)
    whole = int(gpus + FULL)
    return whole * int(1 / each + FULL) + int((gpus - whole) / each + FULL)


def with_own(
    nodes: Sequence[Node], own: Mapping[str, int], cluster: Cluster, models: Mapping[str, int] | None = None
) -> list[Node]:
    """Free nodes, with what a run's own workers and language models hold ({node id: how many}) counted as free."""
    held = models or {}
    return [
        Node(
            n.id,
            n.address,
            n.cpus + own.get(n.id, 0) * cluster.cpus_per_worker + held.get(n.id, 0) * cluster.cpus_per_model,
            n.gpus + own.get(n.id, 0) * cluster.gpus_per_worker + held.get(n.id, 0) * cluster.gpus_per_model,
        )
        for n in nodes
    ]


def groups_apart(nodes: Sequence[str], tensor_parallel: int) -> list[int]:
    """Replicas whose ranks are not on one node, given each rank's node."""
    groups = [nodes[i : i + tensor_parallel] for i in range(0, len(nodes), tensor_parallel)]
    return [replica for replica, group in enumerate(groups) if len(set(group)) > 1]


def nodes_now(free: bool) -> list[Node]:
    """The nodes that are alive, with all that they have, or only what nobody holds."""
    left = available_resources_per_node() if free else None
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"] if left is None else left.get(node["NodeID"], {})
            found.append(Node(node["NodeID"], node["NodeManagerAddress"], have.get("CPU", 0.0), have.get("GPU", 0.0)))
    return found
