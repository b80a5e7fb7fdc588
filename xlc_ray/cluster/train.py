"""Training as a Ray Train job: each worker a rank of replicas × feature shards, fed by Ray Data.

(Groups of workers, and what happens when one fails: supervisor.py.)
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from xlc_ray import files
from xlc_ray.activations.live import LiveStore, is_ready
from xlc_ray.activations.store import Store, is_there, open_source
from xlc_ray.cluster import live, preflight
from xlc_ray.cluster.data import packed_replica_batches, replica_batches
from xlc_ray.cluster.driver import driving
from xlc_ray.cluster.gauges import Gauges
from xlc_ray.cluster.placement import Place, best, groups_apart, layouts, least_models, nodes_now, with_own
from xlc_ray.cluster.session import connect, require, resolve
from xlc_ray.cluster.supervisor import GROWN, supervise
from xlc_ray.cluster.watchdog import Watchdog
from xlc_ray.config import Config, Unreachable, UserError
from xlc_ray.config.sources import HttpSource, LiveSource, StoreSource
from xlc_ray.dictionary import Shards
from xlc_ray.progress import Progress
from xlc_ray.training import logs, loop
from xlc_ray.training.feed import goes_packed
from xlc_ray.training.saving import Stop

POLL_SECONDS = 0.3
"""How often the driver looks for new lines of metrics."""


def train(config: Config) -> dict[str, Any]:
    """Train a dictionary on stored activations, or go on from the run directory's newest checkpoint.

    Returns the last metrics, with `out`. Raises UserError where settings, store or cluster do not allow it, Diverged
    where the loss is not finite, and what made a worker fail when `cluster.max_failures` restarts did not help.
    """
    config = resolve(config)
    data = open_or_make(config)
    wiring = loop.wiring_for(config, data)  # a store that does not fit is said before anything starts
    if isinstance(data, LiveStore):
        live.check(config, data)
    connect()
    least = min(layout.workers for layout in layouts(config))
    require(least * config.cluster.cpus_per_worker, least * config.cluster.gpus_per_worker, f"{least} workers")
    step = loop.prepare(config)
    if step != config.train.steps:
        preflight.check(config, data, wiring)
        if config.source.verify:
            data.verify()
        with driving(config.out), live.generating(config, data, wiring.sites) as generators, _Watch(config, step or 0):
            supervise(config, _worker, generators)
    lines = files.waiting(config.cluster.read_retry_s, lambda: logs.read(config.out))
    last = lines[-1] if lines else {"step": config.train.steps}  # of a finished run that lost them
    return {**last, "out": config.out}


def open_or_make(config: Config) -> Store:
    """The store, made first where it is missing and may be. A store that is there but damaged stays an error."""
    match config.source:
        case LiveSource(path=path, sample_tokens=tokens):
            there, what = is_ready(path, tokens), f"source.path: text, held-out part or sample are missing at {path}"
        case HttpSource(url=url, dataset_id=dataset):
            there, what = is_there(config.source.path), f"source.dataset_id: no complete store {dataset} at {url}"
        case StoreSource(path=path):
            there, what = is_there(path), f"source.path: no complete store at {path}"
    if not there:
        if not config.source.make_if_missing:
            raise UserError(
                f"{what}; make it by jobs/generate.py with the same settings, or set source.make_if_missing: true"
            )
        from xlc_ray.cluster.generate import generate  # with its language-model libraries, which workers do not need

        generate(config)
    return open_source(config.source)


def _worker(settings: dict[str, Any]) -> str | None:
    """One rank: what Ray Train calls in every worker. Returns GROWN where it stopped for a larger layout."""
    config: Config = settings["config"]
    place: Place = settings["place"]
    stacks = files.join(config.out, "stacks", settings["attempt"])
    with Watchdog(config.cluster.hang_timeout_s, stacks, dist.get_rank()) as watchdog:
        try:
            _train_rank(config, place, watchdog, settings)
        except Stop:  # nodes are back
            return GROWN
    return None


def _train_rank(config: Config, place: Place, watchdog: Watchdog, settings: dict[str, Any]) -> None:
    device = get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))  # Ray allows workers one thread
    torch.manual_seed(config.seed)
    shards = Shards.of_world(place.layout.tensor_parallel, device.type)
    own = _nodes_of_ranks(config, place)
    data = _opened(config)
    gauges = Gauges(files.name(config.out), rank=dist.get_rank())
    leader = shards.first

    made, batches = settings["generators"], replica_batches
    if made is not None:
        batches = partial(live.live_batches, made, settings["attempt"])
    elif goes_packed(data.dtype, device):
        batches = packed_replica_batches
    reader = loop.reading(batches, config, data, shards)

    def saved(step: int, metrics: dict[str, Any]) -> None:
        # Ray Train hears of checkpoints only: each report waits for the controller's next poll. The checkpoint itself
        # is ours, so that any number of ranks can read it, with or without Ray.
        ray.train.report(metrics | {"step": step})
        if place.layout != layouts(config)[0] and step != config.train.steps:
            found = _room_again(config, own, made) if leader else None
            if broadcast_from_rank_zero(found is not None and _larger(config, found, place)):
                raise Stop

    announce = gauges.set if leader else lambda _: gauges.set({})
    loop.train_rank(config, data, shards, reader, device, announce, saved, watchdog.beat)


def _opened(config: Config) -> Store:
    """The store, which the driver has opened: where it is not there, this node, or whatever holds it, may get it back
    within `cluster.read_retry_s`. Raises Unreachable after that."""
    until = time.monotonic() + config.cluster.read_retry_s
    while True:
        try:
            return replace(open_source(config.source), patience=config.cluster.read_retry_s)
        except UserError as error:
            if time.monotonic() > until:
                raise Unreachable(str(error)) from None
        time.sleep(1)


def _room_again(config: Config, own: Counter[str], generators: Any) -> Place | None:
    """The best place, were all that this run holds free: its workers, and its language models, which rest between
    groups."""
    models = {} if generators is None else ray.get(generators.models.remote())
    return best(config, with_own(nodes_now(free=True), own, config.cluster, models), least_models(config))


def _larger(config: Config, found: Place, now: Place) -> bool:
    allowed = layouts(config)
    return allowed.index(found.layout) < allowed.index(now.layout)


def _nodes_of_ranks(config: Config, place: Place) -> Counter[str]:
    """Workers by node. That Ray gives ranks by node, in the order of bundles, is what `place` relies on."""
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    assert Counter(nodes) == Counter(place.nodes), "workers are where they were placed"
    apart = groups_apart(nodes, place.layout.tensor_parallel)
    assert config.cluster.placement == "any" or not apart, f"replicas {apart} span nodes"
    return Counter(nodes)


class _Watch:
    """The driver's view of a run: a thread that follows metrics.jsonl and draws the progress line."""

    def __init__(self, config: Config, step: int):
        self.config, self.step = config, step
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        train = self.config.train
        with Progress("train", "steps", train.steps, self.step, self.step * train.batch_tokens) as progress:
            while True:
                last = self.stop.wait(POLL_SECONDS)
                self._show(progress)
                if last:
                    return

    def _show(self, progress: Progress) -> None:
        try:
            m = logs.last(self.config.out)
        except (UserError, *files.failures()):
            return  # the next look may tell
        if m and m["step"] > self.step:
            self.step = m["step"]
            values = f"loss {m['loss']:.4g}", f"ev {m['explained_variance']:.3f}", f"l0 {m['l0']:.1f}"
            if "kl" in m:
                values = *values, f"kl {m['kl']:.3f}"
            progress.update(m["step"], m["tokens"], *values, f"dead {m['dead_features']:.1%}")
