"""The order of data: a pure function of (chunk sizes, seed, position in the stream).

The stream is epoch 0, epoch 1, … without end. In epoch e the slices of all chunks are permuted by
`default_rng([seed, e])`; window k is the next `window_slices` of them, its rows permuted by
`default_rng([seed, e, k + 1])` (k + 1, since numpy gives [seed, e] and [seed, e, 0] the same numbers). Batch n of B
rows is stream rows [nB, (n+1)B): batches straddle windows and epochs, so nothing is dropped, and nothing repeats within
an epoch. Whoever holds a position can go on from there; no worker count enters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """Rows of the stream that are read together and mixed with each other."""

    start: int
    """Stream position of the first row."""
    chunk: np.ndarray
    """Chunk of each row, int32 [n]."""
    row: np.ndarray
    """Row within its chunk, int32 [n]."""

    def __len__(self) -> int:
        return len(self.chunk)


@dataclass(frozen=True)
class _Epoch:
    slices: np.ndarray
    """Permuted slice numbers."""
    starts: np.ndarray
    """First row of each window within the epoch, and the end: [windows + 1]."""


class Order:
    """The endless stream of rows over chunks of `chunk_rows` rows each."""

    def __init__(self, chunk_rows: Sequence[int], seed: int, slice_rows: int, window_slices: int) -> None:
        assert chunk_rows, "a store has chunks"
        assert min(chunk_rows) > 0, "a chunk has rows"
        assert slice_rows > 0
        assert window_slices > 0
        self.seed, self.window_slices = seed, window_slices
        rows = np.asarray(chunk_rows, dtype=np.int64)
        per_chunk = -(-rows // slice_rows)
        first = np.cumsum(per_chunk) - per_chunk
        self._chunk = np.repeat(np.arange(len(rows), dtype=np.int32), per_chunk)
        self._start = ((np.arange(len(self._chunk)) - first[self._chunk]) * slice_rows).astype(np.int32)
        self._length = np.minimum(slice_rows, rows[self._chunk] - self._start).astype(np.int32)
        self.epoch_rows = int(rows.sum())
        self.epoch_windows = -(-len(self._chunk) // window_slices)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def window(self, w: int) -> Window:
        """Window w of the whole stream."""
        epoch, k = divmod(w, self.epoch_windows)
        plan = self._epoch(epoch)
        slices = plan.slices[k * self.window_slices : (k + 1) * self.window_slices]
        length = self._length[slices]
        before = np.cumsum(length) - length
        row = np.arange(length.sum(), dtype=np.int32) + np.repeat(self._start[slices] - before, length).astype(np.int32)
        mix = np.random.default_rng([self.seed, epoch, k + 1]).permutation(len(row))
        start = epoch * self.epoch_rows + int(plan.starts[k])
        return Window(start, np.repeat(self._chunk[slices], length)[mix], row[mix])

    def window_at(self, position: int) -> int:
        """The window that holds a row of the stream."""
        epoch, offset = divmod(position, self.epoch_rows)
        inside = int(np.searchsorted(self._epoch(epoch).starts, offset, side="right")) - 1
        return epoch * self.epoch_windows + inside

    def _epoch(self, epoch: int) -> _Epoch:
        # Two are kept: a batch may straddle epochs. Made anew from numbers, never stored.
        if epoch not in self._epochs:
            slices = np.random.default_rng([self.seed, epoch]).permutation(len(self._chunk))
            ends = np.cumsum(self._length[slices], dtype=np.int64)
            last = np.append(np.arange(self.window_slices, len(slices), self.window_slices), len(slices)) - 1
            self._epochs[epoch] = _Epoch(slices, np.concatenate([[0], ends[last]]))
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
