"""Ray Data feeding one training replica: the batches of `activations.source.batches`, read ahead in other processes.

A read task yields the replica's rows of a few consecutive windows of the stream, a block a window. The executor lives
in an actor beside the trainer (`streaming_split`), so that neither scheduling nor reading takes the trainer's time.
Readers take no CPU of Ray's count: training workers that took them all could otherwise never be fed.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.extensions import ArrowTensorArray

from xlc_ray.activations.order import Order
from xlc_ray.activations.packed import PackedBatch, PackedRows
from xlc_ray.activations.source import FRESH, Memory, Share, rebatch, rebatch_packed
from xlc_ray.activations.store import Store, stored_dtype
from xlc_ray.cluster.blocks import Tasks, data_context

READERS = 2
"""Tasks that read at once, for each replica."""
TASK_WINDOWS = 8
"""Windows of a task: one a task spends a third of the time on Ray's bookkeeping."""
PIPELINE_TASKS = 1024
"""Tasks of a pipeline: each costs about 4 ms before the first batch. A longer stream is several pipelines."""
PREFETCH = 2
"""Windows held ready for the trainer."""

Read = Callable[[list[ray.ObjectRef], range, tuple[str, ...], Share], Iterator[pa.Table]]


def replica_batches(
    store: Store, order: Order, sites: Sequence[str], share: Share, memory: Memory = FRESH
) -> Iterator[dict[str, torch.Tensor]]:
    """A replica's share of batches: {site: [batch_rows / replicas, width]}.

    Equal, bit for bit, to `activations.source.batches` with the same arguments. Close the iterator to stop reading.
    Raises what reading raises (UserError for a damaged chunk), wrapped by Ray.
    """
    tables = _tables(store, order, sites, share, stored_dtype(store.dtype).itemsize, _read, "numpy")
    return rebatch(tables, share.rows_each, store.dtype, memory.batch)


def packed_replica_batches(
    store: Store, order: Order, sites: Sequence[str], share: Share, memory: Memory = FRESH
) -> Iterator[PackedBatch]:
    """Likewise of a store of int8, equal to `activations.source.packed_batches`."""
    tables = _tables(store, order, sites, share, 1, _read_packed, "pyarrow")
    return rebatch_packed((rows for table in tables for rows in _of_table(table)), share.rows_each)


def _tables(
    store: Store, order: Order, sites: Sequence[str], share: Share, itemsize: int, read: Read, batch_format: str
) -> Iterator[Any]:
    """What `read` yields of the share's windows, in tasks of a few. A number has `itemsize` bytes."""
    windows = share.windows(order)
    row_bytes = sum(store.manifest.sites[site] for site in sites) * itemsize
    window_bytes = order.epoch_rows * row_bytes // (order.epoch_windows * share.replicas)
    source = ray.put((store, order))
    reads = (
        functools.partial(read, [source], windows[i : i + TASK_WINDOWS], tuple(sites), share)
        for i in range(0, len(windows), TASK_WINDOWS)
    )
    while some := list(itertools.islice(reads, PIPELINE_TASKS)):
        tasks = Tasks("Activations", some, window_bytes * TASK_WINDOWS)
        # A task's blocks are joined up to the target: less than a window leaves every window a block of its own.
        with ray.data.DataContext.current(data_context(max(1, window_bytes * 3 // 4))):
            dataset = ray.data.read_datasource(
                tasks, override_num_blocks=len(tasks.reads), num_cpus=0, concurrency=READERS
            )
            dataset.set_name("training")
            (blocks,) = dataset.streaming_split(1)
        yield from blocks.iter_batches(batch_size=None, batch_format=batch_format, prefetch_batches=PREFETCH)


def _read(source: list[ray.ObjectRef], windows: range, sites: tuple[str, ...], share: Share) -> Iterator[pa.Table]:
    store, order = _source(source[0])
    for _, chunk, row in share.parts(order, windows):
        found = store.gather(chunk, row, sites)
        yield pa.table({site: ArrowTensorArray.from_numpy(values) for site, values in found.items()})


def _read_packed(
    source: list[ray.ObjectRef], windows: range, sites: tuple[str, ...], share: Share
) -> Iterator[pa.Table]:
    store, order = _source(source[0])
    for _, chunk, row in share.parts(order, windows):
        yield _table(store.packed(chunk, row, sites))


def _table(rows: PackedRows) -> pa.Table:
    """A window as one row of bytes, which Ray Data cannot cut: what is common to its rows stays with them."""
    arrays: list[pickle.PickleBuffer] = []
    plan = pickle.dumps(rows, protocol=5, buffer_callback=arrays.append)
    cells = [pa.py_buffer(plan), *(pa.py_buffer(array.raw()) for array in arrays)]
    return pa.table({str(n): _cell(buffer) for n, buffer in enumerate(cells)})


def _cell(buffer: pa.Buffer) -> pa.Array:
    ends = pa.py_buffer(np.array([0, buffer.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, buffer])


def _of_table(table: pa.Table) -> Iterator[PackedRows]:
    """The windows of a table; their arrays lie where the table does."""
    for plan, *arrays in zip(*map(_cells, table.columns), strict=True):
        yield pickle.loads(plan, buffers=arrays)


def _cells(column: pa.ChunkedArray) -> Iterator[pa.Buffer]:
    """What `_cell` made, not copied as Arrow's scalars are."""
    for part in column.chunks:
        _, raw, content = part.buffers()
        ends = np.frombuffer(raw, np.int64)[part.offset : part.offset + len(part) + 1]
        for start, stop in itertools.pairwise(ends.tolist()):
            yield content.slice(start, stop - start) if content is not None else pa.py_buffer(b"")


@functools.lru_cache(maxsize=2)
def _source(source: ray.ObjectRef) -> tuple[Store, Order]:
    """The store and the order, unpickled once a process."""
    return ray.get(source)
