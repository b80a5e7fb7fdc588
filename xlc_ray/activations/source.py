"""Batches of stored rows: replica r of R takes rows [nB + r·B/R, nB + (r+1)·B/R) of every global batch n.

`batches` reads in this process. The pieces are there for other readers too, which then give the same batches:
`Share` says which rows of which windows a replica needs, `rebatch` cuts the stream of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from xlc_ray import files
from xlc_ray.activations.chunkfile import as_tensor
from xlc_ray.activations.order import Order, Window
from xlc_ray.activations.store import Memory, Store, fresh


@dataclass(frozen=True)
class Share:
    """A replica's part of batches [start_batch, stop_batch) of the stream."""

    batch_rows: int
    start_batch: int
    stop_batch: int
    replica: int = 0
    replicas: int = 1

    def windows(self, order: Order) -> range:
        """The windows of the stream that hold these batches, whichever replica's."""
        if self.stop_batch <= self.start_batch:
            return range(0)
        first, last = self.start_batch * self.batch_rows, self.stop_batch * self.batch_rows - 1
        return range(order.window_at(first), order.window_at(last) + 1)

    def rows(self, window: Window) -> np.ndarray:
        """Which rows of a window belong to it: ascending indices."""
        assert self.batch_rows % self.replicas == 0, "replicas divide the batch"
        position = window.start + np.arange(len(window), dtype=np.int64)
        asked = (position >= self.start_batch * self.batch_rows) & (position < self.stop_batch * self.batch_rows)
        whose = position % self.batch_rows // (self.batch_rows // self.replicas)
        return np.flatnonzero(asked & (whose == self.replica))

    def parts(self, order: Order, windows: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each of the windows that has any: its number, and chunk [n] and row [n] of these rows, in their order."""
        for w in windows:
            window = order.window(w)
            if len(keep := self.rows(window)):
                yield w, window.chunk[keep], window.row[keep]


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
    memory: Memory = fresh,
) -> Iterator[dict[str, torch.Tensor]]:
    """A replica's share of batches start_batch … stop_batch-1: {site: [batch_rows / replicas, width]} in the store's
    dtype: a dictionary widens what it reads as it lays sites side by side.

    Windows of local files are read into `memory`, one after all batches of the window before it were asked for."""
    share, local = Share(batch_rows, start_batch, stop_batch, replica, replicas), not files.is_url(store.path)

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for _, chunk, row in share.parts(order, share.windows(order)):
            yield store.gather(chunk, row, sites, memory if local else fresh)

    found = blocks() if local else ahead(blocks())  # a disk is read ahead by the system
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
