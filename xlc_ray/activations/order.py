"""The order of data: a pure function of (chunk sizes, seed, position in the stream).

The stream is epoch 0, epoch 1, … without end. In epoch e the slices of all chunks are permuted by
`default_rng([seed, e])`; window k is the next `window_slices` of them, its rows permuted by
`default_rng([seed, e, k + 1])` (k + 1, since numpy gives [seed, e] and [seed, e, 0] the same numbers). Batch n of B
rows is stream rows [nB, (n+1)B): batches straddle windows and epochs, so nothing is dropped, and nothing repeats within
an epoch. Whoever holds a position can go on from there; no worker count enters.

With `mix_chunks` = M, slice j of the S of chunk c stands in the epoch where c + M (j + ½)/S puts it among all slices,
and the permutation is one within each chunk. So chunk c is wanted only while the next M pass, every window holds equal
shares of those that are, and which chunks a window wants is the same in every epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
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
class Need:
    """A chunk in an epoch, and the first and last window of the stream that want it then."""

    epoch: int
    chunk: int
    first: int
    last: int


@dataclass(frozen=True)
class _Epoch:
    slices: np.ndarray
    """Permuted slice numbers."""
    starts: np.ndarray
    """First row of each window within the epoch, and the end: [windows + 1]."""


class Order:
    """The endless stream of rows over chunks of `chunk_rows` rows each."""

    def __init__(
        self, chunk_rows: Sequence[int], seed: int, slice_rows: int, window_slices: int, mix_chunks: int | None = None
    ) -> None:
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
        self._places: np.ndarray | None = None
        if mix_chunks is not None:
            within = np.arange(len(self._chunk)) - first[self._chunk]
            self._places = np.argsort(self._chunk + mix_chunks * (within + 0.5) / per_chunk[self._chunk], kind="stable")
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

    def needs(self, window: int, stop: int) -> Iterator[Need]:
        """The chunks that windows `window` … `stop` - 1 of the stream want, in the order in which they come to want
        them; once an epoch. Only with `mix_chunks`."""
        first, last = self._chunk_windows()
        for epoch in range(window // self.epoch_windows, -(-stop // self.epoch_windows)):
            here = epoch * self.epoch_windows
            for chunk in np.argsort(first, kind="stable").tolist():
                need = Need(epoch, chunk, here + int(first[chunk]), here + int(last[chunk]))
                if need.last >= window and need.first < stop:
                    yield need

    def _chunk_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last window within an epoch that want each chunk, [chunks] each."""
        assert self._places is not None, "without mix_chunks it would be another in every epoch"
        place = np.empty_like(self._places)
        place[self._places] = np.arange(len(place))
        starts = np.flatnonzero(np.diff(self._chunk, prepend=-1))  # slices stand by chunk
        window = place // self.window_slices
        return np.minimum.reduceat(window, starts), np.maximum.reduceat(window, starts)

    def most_chunks(self) -> int:
        """The most chunks that a window, or windows before it as well as after it, want. Only with `mix_chunks`."""
        first, last = self._chunk_windows()
        here = np.bincount(first, minlength=self.epoch_windows)
        gone = np.bincount(last, minlength=self.epoch_windows)
        return int((np.cumsum(here) - np.cumsum(gone) + gone).max())

    def _epoch(self, epoch: int) -> _Epoch:
        # Two are kept: a batch may straddle epochs. Made anew from numbers, never stored.
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed, epoch])
            if self._places is None:
                slices = random.permutation(len(self._chunk))
            else:
                slices = np.lexsort((random.random(len(self._chunk)), self._chunk))[self._places]
            ends = np.cumsum(self._length[slices], dtype=np.int64)
            last = np.append(np.arange(self.window_slices, len(slices), self.window_slices), len(slices)) - 1
            self._epochs[epoch] = _Epoch(slices, np.concatenate([[0], ends[last]]))
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
