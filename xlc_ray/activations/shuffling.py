"""A store's rows in one global order by a seed: row j of the new store is row π(j) of the old one, at every site.

π is a keyed permutation of 0 … n-1, computed row by row in either direction (a Feistel network whose results beyond n
are permuted again), so nobody holds it, and any chunk can be made alone. Rows go by two passes, which read in pieces,
not row by row:

1. each old chunk is written again (`parts/`), its rows by where they go: those of one new chunk stand together;
2. each new chunk collects its piece of every part.

The text of a part stands in its chunk file, so that a piece of it is read as its rows are, by offsets:

    places (window i4, position i4, length of the window i4, width i4) [rows]   windows i4 [windows, width]

A task of either pass holds one chunk of all sites. The disk holds the store three times until the parts go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xlc_ray.activations import store
from xlc_ray.activations.manifest import Span
from xlc_ray.activations.store import Store
from xlc_ray.activations.windows import ChunkText, Windows

_ROUNDS = 8
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64
_TEXT = "text"
_PLACE = np.dtype([("window", "<i4"), ("position", "<i4"), ("length", "<i4"), ("width", "<i4")])
_GAP = 1 << 16  # bytes from a window to the next that is read with it


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
    """The first pass over one old chunk. Raises UserError where it is damaged: the new chunks would hide it."""
    old.verify_chunk(chunk)
    rows = shuffle.part(chunk)
    text = old.windows(chunk)
    found = old.gather(np.full(len(rows), chunk), rows, list(old.manifest.sites))
    store.write_chunk(parts, chunk, found, old.dtype, {_TEXT: _laid_out(text, rows)} if text else None)


def write_new(shuffle: Shuffle, parts: Store, new: str, index: int, before: np.ndarray) -> None:
    """The second pass for one new chunk."""
    chunk, row = shuffle.collect(index, before)
    if parts.manifest.has_text:
        store.write_text(new, _text(parts, index, chunk, row))
    store.write_chunk(new, index, parts.gather(chunk, row, list(parts.manifest.sites)), parts.dtype)


def _laid_out(text: ChunkText, rows: np.ndarray) -> np.ndarray:
    """The text of a part, uint8 [bytes]: where each of its rows stands, then its windows."""
    places, windows = np.empty(len(rows), _PLACE), text.windows
    places["window"], places["position"] = text.row_window[rows], text.row_position[rows]
    places["length"], places["width"] = windows.length[places["window"]], windows.tokens.shape[1]
    return np.concatenate([np.ascontiguousarray(a).view(np.uint8).reshape(-1) for a in (places, windows.tokens)])


def _text(parts: Store, index: int, chunk: np.ndarray, row: np.ndarray) -> ChunkText:
    """The windows of these rows, each once. Two rounds of reading: where the rows stand, and their windows."""
    order = np.argsort(chunk, kind="stable")  # rows of a part stand together there, in this order
    ends = np.append(np.flatnonzero(np.diff(chunk[order])) + 1, len(order))
    first, last = order[np.append(0, ends[:-1])], order[ends - 1]
    spans = _spans(parts, chunk[first], row[first] * _PLACE.itemsize, (row[last] + 1) * _PLACE.itemsize)
    places = np.concatenate([np.frombuffer(raw, _PLACE) for raw in parts.bytes_of(spans)])
    _, once, which = np.unique(chunk[order] << 32 | places["window"], return_index=True, return_inverse=True)
    row_window, row_position = np.empty(len(row), np.int32), np.empty(len(row), np.int32)
    row_window[order], row_position[order] = which, places["position"]
    windows = Windows(_tokens(parts, chunk[order][once], places[once]), places["length"][once])
    return ChunkText(index, windows, row_window, row_position)


def _tokens(parts: Store, part: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The windows at `places` [n] of parts [n], sorted by part and window: int32 [n, width of the widest]."""
    size = places["width"].astype(np.int64) * 4
    start = np.array(parts.chunk_rows)[part] * _PLACE.itemsize + places["window"] * size
    cuts = np.flatnonzero((np.diff(part) != 0) | (np.diff(start) > _GAP)) + 1
    first, last = np.append(0, cuts), np.append(cuts, len(part)) - 1
    found = parts.bytes_of(_spans(parts, part[first], start[first], (start + size)[last]))
    tokens = np.zeros((len(part), places["width"].max()), np.int32)
    for here, end, raw in zip(first, last, found, strict=True):
        for n in range(here, end + 1):
            values = np.frombuffer(raw, "<i4", places["width"][n], start[n] - start[here])
            tokens[n, : len(values)] = values
    return tokens


def _spans(parts: Store, part: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[Span]:
    """Bytes of the text of parts."""
    records = [parts.manifest.chunks[p] for p in part]
    bases = [record.sides[_TEXT] for record in records]
    ends = zip(records, bases, start.tolist(), stop.tolist(), strict=True)
    return [Span(record, base + first, base + last) for record, base, first, last in ends]
