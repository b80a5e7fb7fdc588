"""Live training, as its driver and its workers see it: language models start and end with it, and a replica's leader
reads its rows from chunks in the object store (generators.py has them made).

Each window's rows are copied out of its chunks while the step before is taken, so a replica holds two windows besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.live import LiveStore
from xlc_ray.activations.order import Order
from xlc_ray.activations.source import FRESH, Memory, Share, ahead, rebatch
from xlc_ray.cluster.generators import Asker, Generators
from xlc_ray.config import Config, UserError
from xlc_ray.config.sources import LiveSource
from xlc_ray.progress import size
from xlc_ray.training.loop import order_for

MAKING = ("model.", "base_model.", "dtype", "bytes.model.", "bytes.base_model.")
"""Beginnings of what decides, in a store's identity, the activations of text that is there."""


def check(config: Config, data: LiveStore) -> None:
    """Raises UserError where the directory's sample was made by another model, or as another type, than the chunks to
    come would be; or where fewer chunks may be held than one window and its neighbours mix."""
    from xlc_ray.cluster.plan import identities  # with its language-model libraries, which workers do not need

    assert isinstance(config.source, LiveSource)
    store.compare(data.path, data.manifest.identity, identities(config, data.manifest.sites)[False], MAKING)
    need = order_for(config, data.chunk_rows).most_chunks()
    if need > config.source.held_chunks:
        raise UserError(
            f"source.held_chunks: {config.source.held_chunks} are fewer than the {need} that source.mix_chunks = "
            f"{config.source.mix_chunks} mixes in windows of {config.source.window_slices} slices; allowed: at least "
            f"{need}, and more to make some ahead"
        )


def chunk_bytes(data: store.Store, sites: Sequence[str]) -> int:
    """Bytes of the largest chunk in memory."""
    return max(data.chunk_rows) * store.stored_dtype(data.dtype).itemsize * sum(data.manifest.sites[s] for s in sites)


@contextmanager
def generating(config: Config, data: store.Store, sites: Sequence[str]) -> Iterator[Any]:
    """The handle of `Generators` for a run, None where the source is not live. Ends all of it; after a run that came
    to its end the store of `tee` is complete if every chunk was made."""
    if not isinstance(data, LiveStore):
        yield None
        return
    assert isinstance(config.source, LiveSource)
    generators = start(config, sites)
    try:
        yield generators
        facts = ray.get(generators.close.remote())
    finally:
        ray.kill(generators)
    held = size(facts["most_held"] * chunk_bytes(data, list(data.manifest.sites) if config.source.tee else sites))
    print(f"live      {facts['made']:,} chunks made, at most {facts['most_held']} held ({held})", flush=True)
    finish(config, data)


def start(config: Config, sites: Sequence[str], places: Sequence[Any] = ()) -> Any:
    """The handle of new `Generators`, on this node. They end with this process, which whoever reads from them does not
    survive either. `places`: as in Models."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Generators).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here, max_concurrency=1000
    )
    return actor.remote(config, tuple(sites), tuple(places))


def finish(config: Config, data: LiveStore) -> None:
    """Complete the store of `tee`, where there is one, if every chunk was made."""
    assert isinstance(config.source, LiveSource)
    path = config.source.tee
    if path is None:
        return
    left = len(store.missing_chunks(path, len(data.chunk_rows)))
    if left:
        print(f"tee       {left} chunks of {path} were not needed; jobs/generate.py makes them", flush=True)
    elif not files.exists(files.join(path, "manifest.json")):
        store.finish(path, data.manifest.identity)


def live_batches(
    generators: Any,
    attempt: str,
    data: store.Store,
    order: Order,
    sites: Sequence[str],
    share: Share,
    memory: Memory = FRESH,
) -> Iterator[dict[str, torch.Tensor]]:
    """A replica's share of batches, as `activations.source.batches` would give them, had the chunks been stored. Raises
    what making a chunk raised, wrapped by Ray."""
    windows = share.windows(order)
    asker = Asker(attempt, windows.start, share.replica, share.replicas)

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        held: dict[tuple[int, int], Any] = {}
        first = True
        for w, chunk, row in share.parts(order, windows):
            wanted = [(w // order.epoch_windows, c) for c in np.unique(chunk).tolist()]
            # What this window does not want may be let go from here on: nothing must refer to it.
            held = {key: held[key] for key in wanted if key in held}
            new = [key for key in wanted if key not in held]
            refs = ray.get(generators.chunks.remote(asker, w, [c for _, c in new], first))
            first = False
            held |= {key: ray.get(ref) for key, ref in zip(new, refs, strict=True)}
            del refs
            yield _rows({c: values for (_, c), values in held.items()}, chunk, row, sites)
        held.clear()
        ray.get(generators.done.remote(asker))

    return rebatch(ahead(blocks()), share.rows_each, data.dtype, memory.batch)


def _rows(
    chunks: Mapping[int, Mapping[str, np.ndarray]], chunk: np.ndarray, row: np.ndarray, sites: Sequence[str]
) -> dict[str, np.ndarray]:
    """Copies of rows: chunk [n], row [n] → {site: [n, width]}."""
    first = next(iter(chunks.values()))
    out = {site: np.empty((len(row), first[site].shape[1]), first[site].dtype) for site in sites}
    for index, values in chunks.items():
        here = np.flatnonzero(chunk == index)
        for site in sites:
            out[site][here] = values[site][row[here]]
    return out
