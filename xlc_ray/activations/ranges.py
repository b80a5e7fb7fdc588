"""Rows of a store at a URL: byte ranges of its chunk files by the manifest's offsets, all asked for at once.

With a disk cache, ranges are made of blocks, which are read once and kept: which rows are asked for together changes
from epoch to epoch, blocks do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from xlc_ray import files
from xlc_ray.activations.cache import BLOCK, DiskCache
from xlc_ray.activations.manifest import Manifest, Span
from xlc_ray.config import UserError

_GAP = 64  # rows this close are fetched in one range
_TOGETHER = 1 << 26  # bytes asked for at once
_THREADS = 16  # for file systems that read one range at a time


def fill(
    path: str,
    manifest: Manifest,
    chunk: np.ndarray,
    row: np.ndarray,
    to: np.ndarray,
    out: dict[str, np.ndarray],
    cache: DiskCache | None,
) -> None:
    """Copy rows (sorted by chunk and row) to rows `to` of each site's array in `out`.

    Raises UserError naming what is missing, cut, or could not be read after all attempts.
    """
    cuts = np.flatnonzero((np.diff(chunk) != 0) | (np.diff(row) > _GAP)) + 1
    runs = [part for part in np.split(np.arange(len(row)), cuts) if len(part)]
    asked = [(site, part) for part in runs for site in out]  # neighbours in a file are asked for together
    spans = [_span(manifest, int(chunk[part[0]]), row[part], site, out[site]) for site, part in asked]
    for (site, part), blob in zip(asked, read(path, spans, cache), strict=True):
        values = out[site]
        rows = np.frombuffer(blob, values.dtype).reshape(-1, values.shape[1])
        values[to[part]] = rows[row[part] - row[part[0]]]


def _span(manifest: Manifest, chunk: int, rows: np.ndarray, site: str, values: np.ndarray) -> Span:
    record, size = manifest.chunks[chunk], values.shape[1] * values.itemsize
    offset = record.offsets[site]
    assert offset is not None, "a store at a URL has offsets"
    return Span(record, offset + int(rows[0]) * size, offset + (int(rows[-1]) + 1) * size)


def read(path: str, spans: Sequence[Span], cache: DiskCache | None) -> Iterator[bytes]:
    """The bytes of each span, in order; no more than `_TOGETHER` of what is fetched for them (and a span) are held."""
    batch: list[Span] = []
    size, unit = 0, 1 if cache is None else BLOCK
    for span in spans:
        batch.append(span)
        size += (-(-span.stop // unit) - span.start // unit) * unit  # blocks that two of them share count twice
        if size >= _TOGETHER:
            yield from _read_batch(path, batch, cache)
            batch, size = [], 0
    yield from _read_batch(path, batch, cache)


def _read_batch(path: str, spans: Sequence[Span], cache: DiskCache | None) -> Iterator[bytes]:
    if cache is None:
        yield from fetch(path, spans)
        return
    blocks: dict[tuple[str, int], bytes] = {}
    missing: dict[tuple[str, int], Span] = {}
    for span in spans:
        for n in range(span.start // BLOCK, -(-span.stop // BLOCK)):
            block = Span(span.record, n * BLOCK, min((n + 1) * BLOCK, span.record.bytes))
            place = span.record.file, n
            if place not in blocks and place not in missing:
                if (kept := cache.get(_key(path, block), block.stop - block.start)) is None:
                    missing[place] = block
                else:
                    blocks[place] = kept
    for (place, block), data in zip(missing.items(), fetch(path, list(missing.values())), strict=True):
        cache.put(_key(path, block), data)
        blocks[place] = data
    for span in spans:
        parts = range(span.start // BLOCK, -(-span.stop // BLOCK))
        whole = b"".join([blocks[span.record.file, n] for n in parts])
        yield whole[span.start - parts.start * BLOCK :][: span.stop - span.start]


def _key(path: str, block: Span) -> str:
    # With the checksum: a chunk that was made anew is another one.
    record = block.record
    return f"{path} {record.file} {record.checksum} {record.bytes} {block.start}"


def fetch(path: str, spans: Sequence[Span]) -> list[bytes]:
    """The bytes of each span, from where they are; those that fail are asked for again."""
    fs, base = files.filesystem(path)
    found: dict[int, bytes] = {}

    def attempt() -> None:
        todo = [i for i in range(len(spans)) if i not in found]
        failed: BaseException | None = None
        for i, answer in zip(todo, _ask(fs, base, [spans[i] for i in todo]), strict=True):
            if isinstance(answer, FileNotFoundError):
                raise UserError(f"{files.join(path, spans[i].record.file)}: the chunk is missing")
            if isinstance(answer, BaseException):
                # The one that will not pass is what the user must hear of.
                failed = answer if failed is None or not files.may_pass(answer) else failed
            else:
                found[i] = answer
        if failed is not None:
            raise failed

    files.again(path, attempt)
    for i, span in enumerate(spans):
        if len(found[i]) != span.stop - span.start:
            raise UserError(
                f"{files.join(path, span.record.file)}: cut, or its server knows no byte ranges: {len(found[i])} bytes "
                f"where {span.stop - span.start} were asked for at {span.start}"
            )
    return [found[i] for i in range(len(spans))]


def _ask(fs: Any, base: str, spans: Sequence[Span]) -> list[Any]:
    names = [files.join(base, span.record.file) for span in spans]
    starts, stops = [span.start for span in spans], [span.stop for span in spans]
    if fs.async_impl:
        return fs.cat_ranges(names, starts, stops, on_error="return")

    def one(name: str, start: int, stop: int) -> Any:
        try:
            return fs.cat_file(name, start, stop)
        except files.failures() as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, names, starts, stops))
