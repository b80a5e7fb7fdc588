"""bfloat16 in seven tenths of the bytes, without loss (`bfloat16_zstd`).

Rows go in blocks of 64. A block is the low bytes of its numbers (mantissas, which no program makes smaller) as they
are, then their high bytes (signs and exponents, which vary little) by Zstandard:

    low u8 [rows, d]   high, compressed

Beside its blocks a site has in the chunk file `starts` i64 [blocks + 1]: where each begins, so that a slice of rows
needs a slice of the blocks. It pays where a byte is dear, at URLs: unpacking takes a core longer than a local disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from xlc_ray import files
from xlc_ray.activations.manifest import MEND, ChunkRecord, Manifest, Read, Span
from xlc_ray.config import UserError

DTYPE = "bfloat16_zstd"
ROWS = 64
_LEVEL = 1  # higher ones take longer and gain nothing on exponents


@dataclass(frozen=True)
class Squeezed:
    """The rows of one site in a chunk."""

    rows: int
    values: np.ndarray
    """The blocks, uint8 [bytes]."""
    side: np.ndarray
    """Where each begins, as bytes: uint8 [8 (blocks + 1)]."""


def squeeze(values: np.ndarray) -> Squeezed:
    """Squeeze bfloat16 rows, uint16 [rows, d]."""
    codec = pa.Codec("zstd", compression_level=_LEVEL)
    parts, starts = [], [0]
    for first in range(0, len(values), ROWS):
        low, high = _planes(values[first : first + ROWS])
        packed = codec.compress(high.tobytes(), asbytes=True)
        parts += [low.tobytes(), packed]
        starts.append(starts[-1] + low.size + len(packed))
    whole = np.frombuffer(b"".join(parts), np.uint8)
    return Squeezed(len(values), whole, np.array(starts, "<i8").view(np.uint8))


def _planes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (values & 0xFF).astype(np.uint8), (values >> 8).astype(np.uint8)


def fill(
    read: Read,
    path: str,
    manifest: Manifest,
    chunk: np.ndarray,
    row: np.ndarray,
    to: np.ndarray,
    out: Mapping[str, np.ndarray],
) -> None:
    """Copy rows (sorted by chunk and row) of the store at `path` to rows `to` of each site's array in `out`, by two
    rounds of `read`. Raises UserError naming a chunk whose blocks are none."""
    codec = pa.Codec("zstd")
    ends = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
    parts = [slice(start, stop) for start, stop in pairwise(ends) if stop > start]
    asked = [(site, part, manifest.chunks[chunk[part.start]]) for part in parts for site in out]
    tables = [np.frombuffer(raw, "<i8") for raw in read([_table(record, site) for site, _, record in asked])]
    wanted = [list(_runs(row[part] // ROWS)) for _, part, _ in asked]
    spans = [
        _span(path, record, site, starts, run)
        for (site, _, record), starts, runs in zip(asked, tables, wanted, strict=True)
        for run in runs
    ]
    found = iter(read(spans))
    for (site, part, record), starts, runs in zip(asked, tables, wanted, strict=True):
        for run in runs:
            rows = np.empty((min(run.stop * ROWS, record.rows) - run.start * ROWS, out[site].shape[1]), np.uint16)
            try:
                _unpack(codec, starts, run, next(found), rows)
            except (OSError, ValueError) as error:
                where = files.join(path, record.file)
                raise UserError(f"{where}: altered: {site} cannot be unpacked ({error}); {MEND}") from None
            first, last = np.searchsorted(row[part], [run.start * ROWS, run.stop * ROWS])
            here = slice(part.start + first, part.start + last)
            out[site][to[here]] = rows[row[here] - run.start * ROWS]


def _runs(blocks: np.ndarray) -> Iterable[range]:
    """Neighbouring blocks among these, which ascend."""
    blocks = np.unique(blocks)
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1):
        yield range(int(run[0]), int(run[-1]) + 1)


def _table(record: ChunkRecord, site: str) -> Span:
    return Span(record, record.sides[site], record.sides[site] + 8 * (-(-record.rows // ROWS) + 1))


def _span(path: str, record: ChunkRecord, site: str, starts: np.ndarray, run: range) -> Span:
    base, start, stop = record.offsets[site], int(starts[run.start]), int(starts[run.stop])
    if base is None or not 0 <= start <= stop <= record.bytes - base:
        raise UserError(f"{files.join(path, record.file)}: altered: blocks of {site} lie outside; {MEND}")
    return Span(record, base + start, base + stop)


def _unpack(codec: pa.Codec, starts: np.ndarray, run: range, raw: np.ndarray | bytes, out: np.ndarray) -> None:
    """Blocks of rows, into uint16 [rows, d]. Raises OSError or ValueError on what is no block."""
    pairs, view, base = (
        out.view(np.uint8).reshape(-1, 2),
        memoryview(np.frombuffer(raw, np.uint8).data),
        int(starts[run.start]),
    )
    size = ROWS * out.shape[1]
    for number, block in enumerate(run):
        numbers = pairs[number * size : (number + 1) * size]
        here = view[int(starts[block]) - base : int(starts[block + 1]) - base]
        numbers[:, 0] = np.frombuffer(here[: len(numbers)], np.uint8)
        numbers[:, 1] = np.frombuffer(codec.decompress(here[len(numbers) :], len(numbers)), np.uint8)
