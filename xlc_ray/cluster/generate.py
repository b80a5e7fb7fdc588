"""Generation: text → token windows → the model's activations → a store of chunk files, by Ray tasks and Ray Data.

1. Tokenise until both splits have their tokens; write which windows and rows each chunk holds: the plan (plan.py).
2. For each chunk that is missing: one of a pool of language-model actors harvests it, a task writes it.

The plan fixes everything: a rerun makes only what is missing, and neither interruptions nor the number of actors change
the result. For a live source, of the training split only the sample is made here, the rest by generators.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.activations.live import sample_chunks
from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.cluster import plan
from xlc_ray.cluster.blocks import data_context
from xlc_ray.cluster.placement import nodes_now, require_model, room_for_models
from xlc_ray.cluster.preflight import seen_by_all
from xlc_ray.cluster.session import connect, resolve
from xlc_ray.config import Cluster, Config
from xlc_ray.config.sources import HttpSource, LiveSource, StoreSource
from xlc_ray.progress import Progress

WRITERS = 2
"""Chunks written at once. Writers take no CPU of Ray's count: beside actors that took all they could never start."""

Chunk = tuple[bool, int]
"""(held out?, index)."""


def generate(config: Config) -> dict[str, Any]:
    """Make the activations that `config` asks for, or what is still missing of them, at `source.path`.

    Returns `path`, `sites`, `tokens`, `held_out_tokens`, `bytes`, `chunks`, `live` (chunks left to live training), and
    of what was made now: `made` (chunks), `seconds`, `tokens_per_s`. Raises UserError where settings, model or text do
    not allow it, or the path holds activations made with other settings.
    """
    config = resolve(config)
    paths = {False: config.source.path, True: files.join(config.source.path, "held_out")}
    widths = plan.site_widths(config)
    identities = plan.identities(config, widths)
    for held_out, path in paths.items():
        plan.claim(path, identities[held_out])
    if any(store.read_plan(path) is None for path in paths.values()):
        plan.make_plan(config, paths)
    rows = {held_out: store.read_plan(path) or [] for held_out, path in paths.items()}
    wanted = dict(rows)
    match config.source:
        case LiveSource(sample_tokens=tokens):
            wanted[False] = rows[False][: sample_chunks(rows[False], tokens)]
        case StoreSource() | HttpSource():
            pass
    todo = [
        (held_out, i) for held_out, path in paths.items() for i in store.missing_chunks(path, len(wanted[held_out]))
    ]
    started = time.monotonic()
    if todo:
        _make_chunks(config, list(widths), paths, wanted, todo)
    seconds = time.monotonic() - started
    for held_out, path in paths.items():
        changed = any(split == held_out for split, _ in todo) or not files.exists(files.join(path, "manifest.json"))
        if changed and not store.missing_chunks(path, len(rows[held_out])):
            store.finish(path, identities[held_out])
    made_tokens = sum(rows[held_out][i] for held_out, i in todo)
    return _summary(config, widths) | {
        "made": len(todo),
        "seconds": seconds,
        "tokens_per_s": made_tokens / seconds if todo else 0.0,
    }


def _summary(config: Config, widths: dict[str, int]) -> dict[str, Any]:
    train, held_out = (store.open_source(config.source, *inside).manifest for inside in ((), ("held_out",)))
    made = [chunk for manifest in (train, held_out) for chunk in manifest.chunks if chunk.bytes]
    return {
        "path": config.source.path,
        "sites": list(widths),
        "tokens": train.tokens,
        "held_out_tokens": held_out.tokens,
        "bytes": sum(chunk.bytes for chunk in made),
        "chunks": len(made),
        "live": len(train.chunks) + len(held_out.chunks) - len(made),
    }


def _make_chunks(
    config: Config, sites: list[str], paths: dict[bool, str], rows: dict[bool, list[int]], todo: list[Chunk]
) -> None:
    total = sum(map(len, rows.values()))
    missing = set(todo)
    done = total - len(missing)
    tokens = sum(n for held_out, counts in rows.items() for i, n in enumerate(counts) if (held_out, i) not in missing)
    with Progress("generate", "chunks", total, done, tokens) as progress:
        for held_out, index in _harvest(config, sites, paths, todo):
            done, tokens = done + 1, tokens + rows[held_out][index]
            progress.update(done, tokens)


def _harvest(config: Config, sites: list[str], paths: dict[bool, str], todo: list[Chunk]) -> Iterator[Chunk]:
    """Make chunks; yields each when it is complete on disk. Ray restarts an actor that dies and redoes its chunk."""
    connect()
    cluster = config.cluster
    require_model(cluster, "a language model")
    seen_by_all(config.source.path)
    items = [{"held_out": held_out, "index": index} for held_out, index in todo]
    with ray.data.DataContext.current(data_context(None)):  # a chunk is a block, whole
        chunks = ray.data.from_items(items, override_num_blocks=len(items))
        harvested = chunks.map_batches(
            Harvester,
            fn_constructor_args=(config, sites, paths),
            batch_size=1,
            compute=ActorPoolStrategy(size=_pool_size(cluster, len(todo)), max_tasks_in_flight_per_actor=2),
            num_cpus=cluster.cpus_per_model,
            num_gpus=cluster.gpus_per_model,
        )
        written = harvested.map_batches(
            functools.partial(write_chunk, paths=paths, dtype=config.generate.dtype, patience=cluster.read_retry_s),
            batch_size=None,
            num_cpus=0,
            compute=TaskPoolStrategy(min(WRITERS, len(items))),
        )
    written.set_name("generate")
    for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(batch["held_out"].tolist(), batch["index"].tolist(), strict=True)


def _pool_size(cluster: Cluster, chunks: int) -> int:
    """Actors that find room now, at most `model_actors`: those that wait would only hold up other work."""
    return max(1, min(cluster.model_actors, chunks, room_for_models(nodes_now(free=True), cluster)))


class Harvester:
    """One language model or two in an actor, loaded by the first call, whose errors reach the user as they are."""

    def __init__(self, config: Config, sites: list[str], paths: dict[bool, str]) -> None:
        self._config, self._sites, self._paths = config, sites, paths
        self._model: LanguageModel | ModelPair | None = None

    def load(self) -> LanguageModel | ModelPair:
        """The model, loaded if it is not."""
        if self._model is None:
            cluster = self._config.cluster
            torch.set_num_threads(max(1, int(cluster.cpus_per_model)))  # Ray allows workers one thread
            self._model = load_models(self._config, self._sites, "cuda" if cluster.gpus_per_model else "cpu")
        return self._model

    def make(self, held_out: bool, index: int) -> dict[str, np.ndarray]:
        """One chunk: {site: [rows, width]} in the stored form."""
        path, make, patience = self._paths[held_out], self._config.generate, self._config.cluster.read_retry_s
        chunk = files.waiting(patience, lambda: store.read_text(path, index))
        return harvest_chunk(self.load(), chunk, self._sites, make.batch_windows, make.dtype)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One chunk: columns `held_out` and `index` (the same in every row), and one of [rows, width] a site."""
        held_out, index = bool(batch["held_out"].item()), int(batch["index"].item())
        found = self.make(held_out, index)
        rows = len(next(iter(found.values())))
        return {"held_out": np.full(rows, held_out), "index": np.full(rows, index), **found}


def write_chunk(
    batch: dict[str, np.ndarray], paths: dict[bool, str], dtype: str, patience: float
) -> dict[str, np.ndarray]:
    """Write a chunk as `Harvester` gives it. A local file system that fails is asked again for `patience` seconds."""
    held_out, index = bool(batch.pop("held_out")[0]), int(batch.pop("index")[0])
    files.waiting(patience, lambda: store.write_chunk(paths[held_out], index, batch, dtype))
    return {"held_out": np.array([held_out]), "index": np.array([index])}
