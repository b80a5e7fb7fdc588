"""The text behind a store's rows, in batches of whole token windows: for training that runs the language model.

The stream is epoch 0, epoch 1, … of the store's rows (its kept tokens) without end, window after window: in epoch e the
windows of all chunks are permuted by `default_rng([seed, e])`. A batch is any range of stream rows: the windows they
stand in, with just these tokens kept. So batches of B tokens hold exactly B, a window across a border is in both
batches with another part kept, nothing is dropped, nothing repeats within an epoch, and resuming is a number.

All text is held in memory: 5 bytes a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from xlc_ray.activations.store import Store


@dataclass(frozen=True)
class Passages:
    """Windows of text, and which of their tokens are meant."""

    tokens: Tensor
    """[n, context] int64, padded on the right."""
    length: Tensor
    """[n] int64: real tokens of each window."""
    keep: Tensor
    """[n, context] bool."""

    @property
    def attention(self) -> Tensor:
        """[n, context] int64: 1 = real token."""
        return (torch.arange(self.tokens.shape[1], device=self.length.device) < self.length[:, None]).long()

    def to(self, device: torch.device) -> Passages:
        """The same on a device."""
        return Passages(self.tokens.to(device), self.length.to(device), self.keep.to(device))


class PassageStream:
    """The endless stream of a store's rows, read with the windows around them."""

    def __init__(self, store: Store, seed: int) -> None:
        tokens, length, keep = [], [], []
        for chunk in range(len(store.chunk_rows)):
            text = store.windows(chunk)
            assert text is not None, "a store without text has been refused"
            kept = np.zeros(text.windows.tokens.shape, dtype=bool)
            kept[text.row_window, text.row_position] = True
            tokens.append(text.windows.tokens)
            length.append(text.windows.length)
            keep.append(kept)
        self.tokens, self.length, self.keep = np.concatenate(tokens), np.concatenate(length), np.concatenate(keep)
        self.seed, self.rows = seed, int(self.keep.sum())
        self._counts = self.keep.sum(axis=1)
        self._epoch = lru_cache(maxsize=2)(self._permuted)  # made anew from numbers, never stored

    def read(self, start: int, stop: int) -> Passages:
        """Rows start … stop-1 of the stream."""
        which, keep = [], []
        while start < stop:
            epoch, first = divmod(start, self.rows)
            last = min(first + stop - start, self.rows)
            windows, ends = self._epoch(epoch)
            lo, hi = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1
            here = windows[lo:hi]
            kept = self.keep[here]
            row = np.cumsum(kept).reshape(kept.shape) - 1 + ends[lo] - self._counts[here[0]]
            which.append(here)
            keep.append(kept & (row >= first) & (row < last))
            start += last - first
        index = np.concatenate(which)
        return Passages(
            torch.from_numpy(self.tokens[index].astype(np.int64)),
            torch.from_numpy(self.length[index].astype(np.int64)),
            torch.from_numpy(np.concatenate(keep)),
        )

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of an epoch in their order, and where each one's rows end."""
        windows = np.random.default_rng([self.seed, epoch]).permutation(len(self.tokens))
        return windows, np.cumsum(self._counts[windows])
