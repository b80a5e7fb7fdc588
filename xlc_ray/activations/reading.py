"""Rows of chunk files on this machine's file systems, read by offsets straight to where they go.

Datasets that lie in one piece are read so, whoever wrote them, others by h5py. Rows that lie together are read
together. The system is told of all that is wanted before the first of it is read, so that the disk works while bytes
are copied. Files are read, not mapped: a file system that fails is an error that can be waited for, and a file that was
cut an error, where a map would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import BinaryIO, TypeVar

import h5py
import numpy as np

from xlc_ray import files
from xlc_ray.activations.chunkfile import check_dataset, on_disk, open_hdf5, place
from xlc_ray.activations.manifest import MEND, ChunkRecord, Span
from xlc_ray.config import Unreachable, UserError

T = TypeVar("T")

_OPEN_FILES = 64  # a store may have thousands of chunks
_GAP_BYTES = 4096  # between rows that are read together: about what a call of the system costs
_TOGETHER = 1 << 18  # bytes read together at most: what is sorted from there stays in a core's cache
_CHECKED: dict[str, tuple[tuple[int, int, int], dict[str, int | None]]] = {}
"""By path: which file it was, and where each site's array begins in it; None where it is chunked or compressed."""


def scatter(
    path: str,
    record: ChunkRecord,
    widths: Mapping[str, int],
    dtype: str,
    rows: np.ndarray,
    to: np.ndarray,
    out: Mapping[str, np.ndarray],
    patience: float = 0.0,
) -> None:
    """Copy rows (ascending) of a local chunk file to rows `to` of each site's array in `out`.

    A file system that fails is asked again, with growing pauses, for `patience` seconds. Raises UserError naming the
    file, and the dataset, where it is then missing or unreadable, or is cut, or not as the manifest says.
    """
    _patiently(path, patience, lambda: _scatter(path, record, widths, dtype, rows, to, out))


def span(path: str, span: Span, patience: float = 0.0) -> np.ndarray:
    """Bytes of a local chunk file. As patient as `scatter`, and raises as it does."""

    def read() -> np.ndarray:
        found = np.empty(span.stop - span.start, np.uint8)
        _read_into(_opened(path, _identity(path, span.record.bytes)), path, found, span.start)
        return found

    return _patiently(path, patience, read)


def _patiently(path: str, patience: float, read: Callable[[], T]) -> T:
    try:
        return files.waiting(patience, read, _close)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "the chunk is missing" if missing else f"the chunk cannot be read: {error.strerror or error}"
        raise Unreachable(f"{path}: {what}" + f" (tried for {patience:g} s)" * (patience > 0)) from None


def _close() -> None:
    """What is open may be of a server that is gone."""
    _opened.cache_clear()
    _hdf5.cache_clear()


def _scatter(
    path: str,
    record: ChunkRecord,
    widths: Mapping[str, int],
    dtype: str,
    rows: np.ndarray,
    to: np.ndarray,
    out: Mapping[str, np.ndarray],
) -> None:
    identity = _identity(path, record.bytes)
    known, offsets = _CHECKED.get(path, (None, {}))
    if known != identity:
        offsets = _check_file(path, record, widths, dtype)
        _CHECKED[path] = identity, offsets
    plain = {}
    for site, values in out.items():
        if (offset := offsets[site]) is None:
            dataset = check_dataset(_hdf5(path, identity), path, site, (record.rows, widths[site]), dtype)
            _scatter_hdf5(dataset, rows, to, values)
        else:
            plain[site] = offset
    file = _opened(path, identity)
    runs = {width: _runs(rows, to, width * on_disk(dtype).itemsize) for width in {widths[site] for site in plain}}
    for site, offset in plain.items():
        size = widths[site] * on_disk(dtype).itemsize
        for run in runs[widths[site]]:
            _announce(file, offset + run.first * size, run.count * size)
    space = np.empty(_TOGETHER, np.uint8)
    for site, offset in plain.items():
        _copy(file, path, offset, runs[widths[site]], out[site], space)


@dataclass(frozen=True)
class _Run:
    """Rows that are read together."""

    first: int
    count: int
    to: slice | np.ndarray
    """Where they go: a slice, if just as they lie, else indices."""
    which: slice | np.ndarray
    """Of the rows from `first` on, those that go there: all of them, or indices."""


def _runs(rows: np.ndarray, to: np.ndarray, size: int) -> list[_Run]:
    """Ascending `rows`, of `size` bytes each, and where they go, in runs."""
    cut = np.flatnonzero(np.diff(rows) * size > size + _GAP_BYTES) + 1
    most, found = max(1, _TOGETHER // size), []
    for start, end in pairwise([0, *cut.tolist(), len(rows)]):
        while start < end:
            stop = min(end, int(np.searchsorted(rows, rows[start] + most)))
            first, last, here = int(rows[start]), int(rows[stop - 1]), to[start:stop]
            whole = bool((np.diff(rows[start:stop]) == 1).all())
            straight = whole and bool((np.diff(here) == 1).all())
            where = slice(int(here[0]), int(here[0]) + len(here)) if straight else here
            which = slice(None) if whole else rows[start:stop] - first
            found.append(_Run(first, last + 1 - first, where, which))
            start = stop
    return found


def _copy(file: BinaryIO, path: str, offset: int, runs: Sequence[_Run], values: np.ndarray, space: np.ndarray) -> None:
    """Rows of the array that begins at `offset` of the file, to their places in `values`, by way of `space`."""
    size = values.shape[1] * values.itemsize
    item = np.dtype((np.void, size))  # numpy places whole rows faster than rows of numbers
    rows = values.view(item)[:, 0]
    for run in runs:
        if isinstance(run.to, slice):
            _read_into(file, path, values[run.to], offset + run.first * size)
        else:
            room = space if run.count * size <= len(space) else np.empty(size, np.uint8)  # one row that is longer
            together = room[: run.count * size]
            _read_into(file, path, together, offset + run.first * size)
            rows[run.to] = together.view(item)[run.which]


def _announce(file: BinaryIO, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)


def _read_into(file: BinaryIO, path: str, values: np.ndarray, start: int) -> None:
    raw = values.reshape(-1).view(np.uint8).data
    while len(raw):
        count = os.preadv(file.fileno(), [raw], start)
        if not count:
            raise UserError(f"{path}: cut or altered while it was read")
        raw, start = raw[count:], start + count


def _check_file(path: str, record: ChunkRecord, widths: Mapping[str, int], dtype: str) -> dict[str, int | None]:
    """Once a file and process: where each array begins, which other programs' manifests do not say. Rows are read by
    offsets, where another file of the same size would give any numbers."""
    found = {}
    with open_hdf5(path) as file:
        for site, offset in record.offsets.items():
            dataset = check_dataset(file, path, site, (record.rows, widths[site]), dtype)
            here = dataset.file.filename == file.filename  # not by a link into another
            found[site] = dataset.id.get_offset() if here else None
            if offset not in (None, found[site]):
                raise UserError(f"{path}: {place(site, dtype)} is not where the manifest says; {MEND}")
    return found


def _identity(path: str, expected: int) -> tuple[int, int, int]:
    # Part of the caches' keys: a file that was replaced is never served from an old map.
    status = os.stat(path)
    if status.st_size != expected:
        raise UserError(f"{path}: cut or altered: {status.st_size} bytes where the manifest says {expected}")
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, identity: tuple[int, int, int]) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when nobody holds it any more


@lru_cache(maxsize=_OPEN_FILES)
def _hdf5(path: str, identity: tuple[int, int, int]) -> h5py.File:
    return open_hdf5(path)


def _scatter_hdf5(dataset: h5py.Dataset, rows: np.ndarray, to: np.ndarray, values: np.ndarray) -> None:
    """Slices only (h5py's fancy indexing is slow); each compressed HDF5 chunk is unpacked once."""
    step = dataset.chunks[0] if dataset.chunks else 1024
    block = rows // step
    for first in np.unique(block):
        here = block == first
        try:
            data = dataset[first * step : (first + 1) * step]
        except OSError as error:
            if error.errno:  # of the system: it may pass
                raise
            raise UserError(
                f"{dataset.file.filename}: {dataset.name} cannot be read: {str(error).splitlines()[0]}"
            ) from None
        values[to[here]] = data[rows[here] - first * step]
