"""What is looked at before training starts, because Ray would wait for it in silence or fail late: each wrong thing a
clause of one line.

Workers leave CPUs to Ray Data, or room for the language model of live training; a replica fits a node; network
interfaces exist; the object stores hold the windows that are read ahead, or the chunks that live training holds; the
nodes see the store and the run directory; checkpoints fit the disk.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xlc_ray import files
from xlc_ray.activations.store import Store, stored_dtype
from xlc_ray.cluster.data import PREFETCH, READERS
from xlc_ray.cluster.live import chunk_bytes
from xlc_ray.cluster.placement import (
    FULL,
    Node,
    Place,
    beside,
    best,
    capacity,
    layouts,
    least_models,
    nodes_now,
    room_for_models,
)
from xlc_ray.config import Config, UserError
from xlc_ray.config.sources import LiveSource
from xlc_ray.dictionary import Wiring, checkpoint
from xlc_ray.training import plan
from xlc_ray.training.machine import GB

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MOMENTS = 3  # numbers that a checkpoint holds for each parameter: itself and two moments
ANSWER_SECONDS = 180  # a busy machine takes long to start a process


@dataclass(frozen=True)
class Facts:
    """What one node says of itself: its network interfaces, INTERFACES that are set, and which paths it sees."""

    interfaces: tuple[str, ...]
    environment: Mapping[str, str]
    sees: Mapping[str, bool]


def facts(paths: Sequence[str]) -> Facts:
    """Of the node where this runs."""
    environment = {name: os.environ[name] for name in INTERFACES if os.environ.get(name)}
    interfaces = tuple(name for _, name in socket.if_nameindex())
    return Facts(interfaces, environment, {path: os.path.exists(path) for path in paths})


def check(config: Config, data: Store, wiring: Wiring) -> None:
    """All of it, in the cluster that this process has joined. Raises UserError, one line."""
    nodes = nodes_now(free=False)
    problems = [*room(config, nodes), *disk(config, wiring)]
    stores = {n["NodeID"]: n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]}
    place = best(config, nodes, least_models(config)) or best(config, nodes)
    if place and isinstance(config.source, LiveSource):
        problems += [
            *model_room(config, place, nodes),
            *held_chunks(config.source, data, wiring, nodes, stores),
        ]
    elif place:
        problems += object_stores(config, data, wiring, place, nodes, stores)
    working = [node for node in nodes if capacity(node, config.cluster)]
    reading = [node for node in nodes if node not in working]  # tasks that read take no CPUs, and run anywhere
    for some, paths in ((working, (data.path, config.out)), (reading, (data.path,))):
        for node, found in ask(some, paths).items():
            if some is working:
                problems += network(node, found, config.cluster.gpus_per_worker > 0)
            problems += unseen(node, found)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))


def seen_by_all(path: str) -> None:
    """Raises UserError, one line, where nodes of the cluster do not see a path."""
    found = ask(nodes_now(free=False), [path])
    if problems := [line for node, facts in found.items() for line in unseen(node, facts)]:
        raise UserError("; ".join(problems))


def room(config: Config, nodes: Sequence[Node]) -> Iterator[str]:
    """CPUs for Ray Data, and a node for each replica."""
    cluster, total = config.cluster, sum(node.cpus for node in nodes)
    need = min(layout.workers for layout in layouts(config)) * cluster.cpus_per_worker
    if need > total - FULL:
        yield (
            f"cluster.cpus_per_worker: the workers need {need:g} of the cluster's {total:g} CPUs, which leaves none to "
            "Ray Data, which feeds them; lower it, or add nodes"
        )
    elif best(config, nodes) is None:
        least = min(layout.tensor_parallel for layout in layouts(config))
        yield (
            f"cluster.tensor_parallel: no layout finds room: {least} ranks of {cluster.cpus_per_worker:g} CPUs and "
            f"{cluster.gpus_per_worker:g} GPUs belong on one node, and the nodes have room for "
            f"{', '.join(str(capacity(node, cluster)) for node in nodes)}; lower it, or let replicas span nodes by "
            "cluster.placement: any"
        )


def object_stores(
    config: Config, data: Store, wiring: Wiring, place: Place, nodes: Sequence[Node], stores: Mapping[str, float]
) -> Iterator[str]:
    """Windows that are read, held ready and handed over, of all replicas of a node, against its object store."""
    rows = min(config.source.slice_rows * config.source.window_slices, data.manifest.tokens)
    row_bytes = sum(wiring.widths[site] for site in wiring.sites) * stored_dtype(data.dtype).itemsize
    window = rows * row_bytes / place.layout.replicas
    for node in nodes:
        replicas = -(-place.nodes.count(node.id) // place.layout.tensor_parallel)
        need = (READERS + PREFETCH + 2) * window * replicas
        if need > stores[node.id]:
            yield (
                f"source.window_slices: {config.source.window_slices} slices of {config.source.slice_rows} rows of "
                f"{row_bytes:,} bytes need {need / GB:.2f} GB of the object store of node {node.address}, which has "
                f"{stores[node.id] / GB:.2f} GB; lower it, or start Ray with a larger --object-store-memory"
            )


def model_room(config: Config, place: Place, nodes: Sequence[Node], models: int = 1) -> Iterator[str]:
    """A node for each of so many language models, beside the workers of live training."""
    cluster, left = config.cluster, beside(place.nodes, nodes, config.cluster)
    found = room_for_models(left, cluster)
    if found < models:
        yield (
            f"cluster.cpus_per_model: live training needs a node with {cluster.cpus_per_model:g} CPUs and "
            f"{cluster.gpus_per_model:g} GPUs for {'a' if models == 1 else f'each of {models}'} language "
            f"model{'s' * (models > 1)} beside the workers, which leave "
            f"{', '.join(f'{n.cpus:g} and {n.gpus:g}' for n in left)}; lower it or the workers', or add nodes"
        )


def held_chunks(
    live: LiveSource,
    data: Store,
    wiring: Wiring,
    nodes: Sequence[Node],
    stores: Mapping[str, float],
) -> Iterator[str]:
    """The chunks that live training holds, against the object store of each node: any may come to hold them all."""
    need = held_bytes(live, data, wiring)
    each = need / min(live.held_chunks, len(data.chunk_rows))
    for node in nodes:
        if need > stores[node.id]:
            yield (
                f"source.held_chunks: {live.held_chunks} chunks of {each / GB:.2f} GB need {need / GB:.2f} GB of the "
                f"object store of node {node.address}, which has {stores[node.id] / GB:.2f} GB; lower it with "
                "source.mix_chunks, or generate.chunk_tokens, or start Ray with a larger --object-store-memory"
            )


def held_bytes(live: LiveSource, data: Store, wiring: Wiring) -> int:
    """The most that live training holds."""
    each = chunk_bytes(data, list(data.manifest.sites) if live.tee else wiring.sites)
    return min(live.held_chunks, len(data.chunk_rows)) * each


def disk(config: Config, wiring: Wiring) -> Iterator[str]:
    """train.keep checkpoints and the one being written, less those that are there, against the disk of `out`."""
    if files.is_url(config.out):
        return
    load = plan.work(config, wiring)
    each = MOMENTS * load.number * load.parameters
    count = max(1, config.train.keep + 1 - len(checkpoint.steps(config.out)))
    free = shutil.disk_usage(files.local(config.out)).free
    if count * each > free:
        yield (
            f"train.keep: {count} checkpoints of {each / GB:.2f} GB need {count * each / GB:.2f} GB, the disk of "
            f"{config.out} has {free / GB:.2f} GB; lower it, or choose another --out"
        )


def network(node: str, found: Facts, gpus: bool) -> Iterator[str]:
    """Variables that name interfaces which the node does not have; NCCL's only count where it is used."""
    for name, value in found.environment.items():
        if name.startswith("NCCL") and not gpus:
            continue
        parts = [part.split(":")[0] for part in value.lstrip("^=").split(",")]
        if name.startswith("GLOO") or value.startswith("="):
            wrong = [part for part in parts if part not in found.interfaces]
        elif not value.startswith("^"):  # NCCL takes prefixes; '^' names those to leave out
            wrong = [] if any(i.startswith(tuple(parts)) for i in found.interfaces) else parts
        else:
            wrong = []
        if wrong:
            yield f"{name}={value}: node {node} has no interface {wrong[0]}; it has {', '.join(found.interfaces)}"


def unseen(node: str, found: Facts) -> Iterator[str]:
    """Local paths that a node does not see."""
    for path, there in found.sees.items():
        if not there:
            yield f"{path}: node {node} does not see it; put it on a file system that all nodes share, or give a URL"


def ask(nodes: Sequence[Node], paths: Sequence[str]) -> dict[str, Facts]:
    """{address and beginning of the id: facts} of each node; this one is not asked by a task, and nobody of URLs.
    Raises UserError where a node does not answer."""
    paths = [files.local(path) for path in paths if not files.is_url(path)]
    here = ray.get_runtime_context().get_node_id()
    task = ray.remote(num_cpus=0, max_retries=0)(facts)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(paths)
        for node in nodes
        if node.id != here
    }
    found = {}
    for node in nodes:
        try:
            answer = ray.get(asked[node], timeout=ANSWER_SECONDS) if node in asked else facts(paths)
        except (GetTimeoutError, RayError) as error:
            if node.id not in {other.id for other in nodes_now(free=False)}:
                continue  # it has ended since
            raise UserError(
                f"cluster: node {node.address} gives no answer in {ANSWER_SECONDS} s ({type(error).__name__})"
            ) from None
        found[f"{node.address} ({node.id[:8]})"] = answer
    return found
