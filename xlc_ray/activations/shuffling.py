"""A store's rows in one global order by a seed: row j of the new store is row π(j) of the old one, at every site.

π is a keyed permutation of 0 … n-1, computed row by row in either direction (a Feistel network whose results beyond n
are permuted again), so nobody holds it, and any chunk can be made alone. Rows go by two passes, which read in pieces,
not row by row:

1. each old chunk is written again (`parts/`), its rows by where they go: those of one new chunk stand together;
2. each new chunk collects its piece of every part.

A task of either pass holds one chunk of all sites. The disk holds the store three times until the parts go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from xlc_ray.activations import store
from xlc_ray.activations.store import Store
from xlc_ray.activations.windows import ChunkText, Windows

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


class Permutation:
    """The permutation π of 0 … count-1 that belongs to a seed."""

    def __init__(self, count: int, seed: int) -> None:
        assert 0 < count < 1 << 62
        self.count = count
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._keys = np.random.default_rng([seed, count]).integers(0, 1 << 63, _ROUNDS).astype(np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """π(j) of places j [n], int64."""
        return self._walk(places, self._keys, forward=True)

    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """The j of which π(j) is a row, [n]."""
        return self._walk(rows, self._keys[::-1], forward=False)

    def _walk(self, values: np.ndarray, keys: np.ndarray, forward: bool) -> np.ndarray:
        # What leaves 0 … count-1 goes on along its cycle until it is back, which keeps it a permutation.
        found = self._network(values.astype(np.uint64), keys, forward)
        while len(outside := np.flatnonzero(found >= self.count)):
            found[outside] = self._network(found[outside], keys, forward)
        return found.astype(np.int64)

    def _network(self, values: np.ndarray, keys: np.ndarray, forward: bool) -> np.ndarray:
        half, mask = self._half, (np.uint64(1) << self._half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in keys:
            if forward:
                left, right = right, left ^ (_hash(right, key) & mask)
            else:
                left, right = right ^ (_hash(left, key) & mask), left
        return (left << half) | right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = values ^ key
    for shift, factor in zip((np.uint64(30), np.uint64(27)), _MIX, strict=True):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Shuffle:
    """How the rows of `chunk_rows`, one number an old chunk, become chunks of `step` rows. Plain data."""

    chunk_rows: tuple[int, ...]
    seed: int
    step: int

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(self.chunk_rows)

    @property
    def plan(self) -> list[int]:
        """Rows of each new chunk."""
        return [min(self.step, self.rows - start) for start in range(0, self.rows, self.step)]

    def part(self, chunk: int) -> np.ndarray:
        """The rows of an old chunk in the order in which its part holds them."""
        first = sum(self.chunk_rows[:chunk])
        to = Permutation(self.rows, self.seed).inverse(np.arange(first, first + self.chunk_rows[chunk]))
        return np.argsort(to)

    def pieces(self) -> Iterator[np.ndarray]:
        """For each new chunk: how many rows of each part go to chunks before it, int64 [old chunks]."""
        before = np.zeros(len(self.chunk_rows), np.int64)
        for index, size in enumerate(self.plan):
            yield before
            chunk, _ = self._origin(index, size)
            before = before + np.bincount(chunk, minlength=len(before))

    def collect(self, index: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part, row in it) of each row of a new chunk."""
        chunk, _ = self._origin(index, self.plan[index])
        # Within a part the rows of this chunk stand together, in their order here.
        order = np.argsort(chunk, kind="stable")
        counts = np.bincount(chunk, minlength=len(before))
        row = np.empty(len(chunk), np.int64)
        row[order] = np.arange(len(chunk)) - np.repeat(np.cumsum(counts) - counts - before, counts)
        return chunk, row

    def _origin(self, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = Permutation(self.rows, self.seed)(np.arange(index * self.step, index * self.step + size))
        ends = np.cumsum(self.chunk_rows)
        chunk = np.searchsorted(ends, source, side="right")
        return chunk, source - (ends - np.array(self.chunk_rows))[chunk]


def write_part(shuffle: Shuffle, old: Store, parts: str, chunk: int) -> None:
    """The first pass over one old chunk."""
    rows = shuffle.part(chunk)
    text = old.windows(chunk)
    if text is not None:
        store.write_text(parts, ChunkText(chunk, text.windows, text.row_window[rows], text.row_position[rows]))
    found = old.gather(np.full(len(rows), chunk), rows, list(old.manifest.sites))
    store.write_chunk(parts, chunk, found, old.dtype)


def write_new(shuffle: Shuffle, parts: Store, new: str, index: int, before: np.ndarray) -> None:
    """The second pass for one new chunk."""
    chunk, row = shuffle.collect(index, before)
    if parts.manifest.has_text:
        store.write_text(new, _text(parts, index, chunk, row))
    store.write_chunk(new, index, parts.gather(chunk, row, list(parts.manifest.sites)), parts.dtype)


def _text(parts: Store, index: int, chunk: np.ndarray, row: np.ndarray) -> ChunkText:
    """The windows of these rows, each once."""
    row_window, row_position = np.empty(len(row), np.int32), np.empty(len(row), np.int32)
    tokens, length, have = [], [], 0
    for part in np.unique(chunk):
        here = np.flatnonzero(chunk == part)
        text = _part_text(parts, int(part))
        windows, within = np.unique(text.row_window[row[here]], return_inverse=True)
        row_window[here], row_position[here] = have + within, text.row_position[row[here]]
        tokens.append(text.windows.tokens[windows])
        length.append(text.windows.length[windows])
        have += len(windows)
    return ChunkText(index, Windows(_stacked(tokens), np.concatenate(length)), row_window, row_position)


def _stacked(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """Windows of all parts, padded to the longest."""
    width = max(part.shape[1] for part in tokens)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in tokens])


@lru_cache(maxsize=256)
def _part_text_of(path: str, fingerprint: str, index: int) -> ChunkText:
    return store.read_text(path, index)


def _part_text(parts: Store, part: int) -> ChunkText:
    return _part_text_of(parts.path, str(parts.manifest.fingerprint), part)
