"""Batches of stored rows. A batch is whole micro-batches of M rows; of rows [m, m + M) of the stream, replica r of R
takes [m + r·M/R, m + (r+1)·M/R).

`batches` reads in this process. The pieces are there for other readers too, which then give the same batches:
`Share` says which rows of which windows a replica needs, `rebatch` cuts the stream of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from xlc_ray import files
from xlc_ray.activations.chunkfile import as_tensor
from xlc_ray.activations.order import Order, Window
from xlc_ray.activations.packed import PackedBatch, PackedRows
from xlc_ray.activations.store import Arrays, Store, fresh

T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """Where rows are read to, and batches made, that do not lie together already."""

    window: Arrays = fresh
    """Asked once every batch of the window before it was asked for."""
    batch: Arrays = fresh
    """Asked while the batch before it may still be in use."""


FRESH = Memory()
"""New arrays, for readers whose batches are kept."""


@dataclass(frozen=True)
class Share:
    """A replica's part of batches [start_batch, stop_batch) of the stream."""

    batch_rows: int
    start_batch: int
    stop_batch: int
    replica: int = 0
    replicas: int = 1
    micro_batches: int = 1
    """Parts of a batch that are computed one after another: each holds the same rows for any number of replicas."""

    @property
    def rows_each(self) -> int:
        """Rows of a replica's part of a batch."""
        return self.batch_rows // self.replicas

    def windows(self, order: Order) -> range:
        """The windows of the stream that hold these batches, whichever replica's."""
        if self.stop_batch <= self.start_batch:
            return range(0)
        first, last = self.start_batch * self.batch_rows, self.stop_batch * self.batch_rows - 1
        return range(order.window_at(first), order.window_at(last) + 1)

    def rows(self, window: Window) -> np.ndarray:
        """Which rows of a window belong to it: ascending indices."""
        micro = self.batch_rows // self.micro_batches
        assert micro * self.micro_batches == self.batch_rows, "micro-batches divide the batch"
        assert micro % self.replicas == 0, "replicas divide the micro-batch"
        position = window.start + np.arange(len(window), dtype=np.int64)
        asked = (position >= self.start_batch * self.batch_rows) & (position < self.stop_batch * self.batch_rows)
        whose = position % micro // (micro // self.replicas)
        return np.flatnonzero(asked & (whose == self.replica))

    def parts(self, order: Order, windows: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each of the windows that has any: its number, and chunk [n] and row [n] of these rows, in their order."""
        for w in windows:
            window = order.window(w)
            if len(keep := self.rows(window)):
                yield w, window.chunk[keep], window.row[keep]


def rebatch(
    blocks: Iterable[Mapping[str, np.ndarray]], rows: int, dtype: str, arrays: Arrays = fresh
) -> Iterator[dict[str, torch.Tensor]]:
    """Cut consecutive blocks of stored rows into batches of `rows` rows. Their total is a multiple of it.

    A batch within one block that may be written to is a view of it, and keeps it alive; others are copied to `arrays`.
    """
    batch: dict[str, np.ndarray] = {}
    pairs = ((block, _tensors(block, dtype)) for block in blocks)
    for (block, tensors), start, stop, at in _cut(pairs, rows, lambda pair: len(next(iter(pair[0].values())))):
        if stop - start == rows and tensors:
            yield {site: values[start:stop] for site, values in tensors.items()}
            continue
        if not batch:
            widths = {site: array.shape[1] for site, array in block.items()}
            batch = arrays(widths, rows, next(iter(block.values())).dtype)
        for site, array in block.items():
            batch[site][at : at + stop - start] = array[start:stop]
        if at + stop - start == rows:
            yield {site: as_tensor(array, dtype) for site, array in batch.items()}
            batch = {}


def _tensors(block: Mapping[str, np.ndarray], dtype: str) -> dict[str, torch.Tensor]:
    """The same memory as tensors; none where it may not be written to."""
    if not all(array.flags.writeable for array in block.values()):
        return {}
    return {site: as_tensor(array, dtype) for site, array in block.items()}


def rebatch_packed(blocks: Iterable[PackedRows], rows: int) -> Iterator[PackedBatch]:
    """Likewise, of rows that stay packed. A batch is views of its blocks."""
    batch: PackedBatch = ()
    for block, start, stop, at in _cut(blocks, rows, len):
        batch = *batch, block.part(start, stop)
        if at + stop - start == rows:
            yield batch
            batch = ()


def _cut(blocks: Iterable[T], rows: int, size: Callable[[T], int]) -> Iterator[tuple[T, int, int, int]]:
    """Parts of blocks that each lie in one batch: block, first row, the row after its last, and its place there."""
    have = 0
    for block in blocks:
        used, end = 0, size(block)
        while used < end:
            count = min(rows - have, end - used)
            yield block, used, used + count, have
            used, have = used + count, (have + count) % rows
    assert have == 0, "blocks hold whole batches"


def batches(
    store: Store, order: Order, sites: Sequence[str], share: Share, memory: Memory = FRESH
) -> Iterator[dict[str, torch.Tensor]]:
    """A replica's share of batches: {site: [batch_rows / replicas, width]} in the store's dtype: a dictionary widens
    what it reads as it lays sites side by side."""
    window = fresh if _is_far(store) else memory.window  # what is far away is read ahead
    blocks = _blocks(store, order, share, lambda chunk, row: store.gather(chunk, row, sites, window))
    return rebatch(blocks, share.rows_each, store.dtype, memory.batch)


def packed_batches(
    store: Store, order: Order, sites: Sequence[str], share: Share, memory: Memory = FRESH
) -> Iterator[PackedBatch]:
    """The same batches of a store of int8, still to be unpacked: parts of what was read, which need no `memory`."""
    blocks = _blocks(store, order, share, lambda chunk, row: store.packed(chunk, row, sites))
    return rebatch_packed(blocks, share.rows_each)


def _blocks(store: Store, order: Order, share: Share, read: Callable[[np.ndarray, np.ndarray], T]) -> Iterator[T]:
    """What is read of each window. A disk is read ahead by the system, what is far away by us."""
    blocks = (read(chunk, row) for _, chunk, row in share.parts(order, share.windows(order)))
    return ahead(blocks) if _is_far(store) else blocks


def _is_far(store: Store) -> bool:
    return files.is_url(store.path)


def ahead(blocks: Iterator[T]) -> Iterator[T]:
    """The same blocks, each read in another thread while the one before it is used: two are held."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def first_rows(store: Store, order: Order, sites: Sequence[str], rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` rows of the stream, at most one epoch: {site: [min(rows, stored), width]}."""
    found = next(batches(store, order, sites, Share(min(rows, order.epoch_rows), 0, 1)))
    return {site: values.clone() for site, values in found.items()}  # which keep no window alive
