"""Batches of stored rows: replica r of R takes rows [nB + r·B/R, nB + (r+1)·B/R) of every global batch n.

`batches` reads in this process. The pieces are there for other readers too, which then give the same batches:
`replica_rows` says which rows of a window a replica needs, `read_window` reads them, `rebatch` cuts the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from xlc_ray import files
from xlc_ray.activations.chunkfile import as_tensor
from xlc_ray.activations.order import Order, Window
from xlc_ray.activations.store import Store


def replica_rows(
    window: Window, batch_rows: int, start_batch: int, stop_batch: int, replica: int, replicas: int
) -> np.ndarray:
    """Which rows of a window belong to a replica's share of batches [start_batch, stop_batch): ascending indices."""
    assert batch_rows % replicas == 0, "replicas divide the batch"
    position = window.start + np.arange(len(window), dtype=np.int64)
    asked = (position >= start_batch * batch_rows) & (position < stop_batch * batch_rows)
    return np.flatnonzero(asked & (position % batch_rows // (batch_rows // replicas) == replica))


def windows_of(order: Order, batch_rows: int, start_batch: int, stop_batch: int) -> range:
    """The windows of the stream that hold batches [start_batch, stop_batch)."""
    if stop_batch <= start_batch:
        return range(0)
    return range(order.window_at(start_batch * batch_rows), order.window_at(stop_batch * batch_rows - 1) + 1)


def read_window(store: Store, window: Window, keep: np.ndarray, sites: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows `keep` (indices or a mask) of a window, in stream order: {site: [n, width]} in the stored type."""
    return store.gather(window.chunk[keep], window.row[keep], sites)


def rebatch(blocks: Iterable[dict[str, np.ndarray]], rows: int, dtype: str) -> Iterator[dict[str, torch.Tensor]]:
    """Cut consecutive blocks of stored rows into batches of `rows` rows. Their total is a multiple of it.

    A batch within one block that may be written to is a view of it, and keeps it alive.
    """
    batch: dict[str, np.ndarray] = {}
    have = 0
    for block in blocks:
        size, used = len(next(iter(block.values()))), 0
        while used < size:
            count = min(rows - have, size - used)
            if count == rows:
                yield {site: as_tensor(array[used : used + rows], dtype) for site, array in block.items()}
                used += rows
                continue
            batch = batch or {site: np.empty((rows, *a.shape[1:]), a.dtype) for site, a in block.items()}
            for site, array in block.items():
                batch[site][have : have + count] = array[used : used + count]
            used, have = used + count, have + count
            if have == rows:
                yield {site: as_tensor(array, dtype) for site, array in batch.items()}
                batch, have = {}, 0
    assert have == 0, "blocks hold whole batches"


def batches(
    store: Store,
    order: Order,
    sites: Sequence[str],
    batch_rows: int,
    start_batch: int,
    stop_batch: int,
    replica: int = 0,
    replicas: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """A replica's share of batches start_batch … stop_batch-1: {site: [batch_rows / replicas, width]} in the store's
    dtype: a dictionary widens what it reads as it lays sites side by side."""

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for w in windows_of(order, batch_rows, start_batch, stop_batch):
            window = order.window(w)
            keep = replica_rows(window, batch_rows, start_batch, stop_batch, replica, replicas)
            if len(keep):
                yield read_window(store, window, keep, sites)

    found = ahead(blocks()) if files.is_url(store.path) else blocks()  # a disk is read ahead by the system
    return rebatch(found, batch_rows // replicas, store.dtype)


def ahead(blocks: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The same blocks, each read in another thread while the one before it is used: two are held."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def first_rows(store: Store, order: Order, sites: Sequence[str], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows of the stream, at most one epoch: {site: [min(rows, stored), width]}."""
    found = next(batches(store, order, sites, min(rows, order.epoch_rows), 0, 1))
    return {site: values.clone() for site, values in found.items()}  # which keep no window alive
