"""Rows of one chunk file as a stream: for each array its rows, one after another, in the stored type.

Arrays that lie in the file as they are (contiguous, or HDF5 chunks without a filter) are read by offsets; compressed
ones are unpacked by h5py. A file is opened for each request and closed with it. Only where its arrays lie is
remembered, by what tells it from another file that takes its name, so that a chunk that was replaced is never served.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from xlc_ray.activations.chunkfile import dataset_name
from xlc_ray.config import UserError
from xlc_ray.serving.places import Refusal

PIECE = 1 << 20
"""Bytes of a stream that are held at a time."""
_GAP_BYTES = 8192  # rows this close are read together
_UNPACKED_BYTES = 1 << 30  # an HDF5 chunk that unpacks to more is refused
_UNPACKING = threading.BoundedSemaphore(2)  # HDF5 chunks that are whole in memory at once
_TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16))
_LAYER = re.compile(r"layer_(\d{1,9})")


@dataclass(frozen=True)
class Array:
    """One array [rows, width] of a chunk file."""

    name: str
    rows: int
    width: int
    dtype: np.dtype
    step: int
    """Rows of a piece that lies together in the file."""
    offsets: np.ndarray | None
    """Byte offset of each piece; None where they are compressed."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize


Layout = dict[str, Array]
"""{name in the file: where it lies}."""

_LAYOUTS: dict[tuple[int, int, int, int], Layout] = {}
_REMEMBERED = 4096


class Slice:
    """Rows (ascending) of arrays of one file: `length` bytes, in pieces. Closes the file at the end."""

    def __init__(self, path: Path, rows: Sequence[int], sites: Sequence[str] | None) -> None:
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise Refusal(404, "the chunk is not there") from None
        try:
            layout = layout_of(self._file)
            self._arrays = _named(layout, sites) if sites is not None else _layers(layout)
            self._rows = _checked(rows, self._arrays[0].rows)
        except BaseException:
            self._file.close()
            raise
        self.length = len(self._rows) * sum(array.row_bytes for array in self._arrays)

    def __iter__(self) -> Iterator[bytes]:
        with self._file:
            for array in self._arrays:
                step = max(1, PIECE // array.row_bytes)
                read = _read_packed if array.offsets is None else _read_plain
                for start in range(0, len(self._rows), step):
                    yield read(self._file, array, self._rows[start : start + step]).tobytes()


def layout_of(file: BinaryIO) -> Layout:
    """Where the arrays of an open chunk file lie. Raises Refusal (422) on a file that is no chunk of activations."""
    status = os.fstat(file.fileno())
    identity = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    found = _LAYOUTS.get(identity)
    if found is None:
        found = _read_layout(file, status.st_size)
        if len(_LAYOUTS) >= _REMEMBERED:
            _LAYOUTS.clear()
        _LAYOUTS[identity] = found
    return found


def _read_layout(file: BinaryIO, size: int) -> Layout:
    with _hdf5(file) as hdf5:
        known = [name for name in sorted(hdf5) if name in ("sites", "int8") or _LAYER.fullmatch(name)]
        groups = [name for name in known if _is_here(hdf5, name) and isinstance(hdf5[name], h5py.Group)]
        # Packed arrays are no slices, since what unpacks them is not of rows: clients read their bytes.
        names = [f"{group}/{name}" + "/values" * (group == "int8") for group in groups for name in hdf5[group]]
        found = {name: _array(hdf5, name, size) for name in names}
    if not found:
        raise Refusal(422, "the chunk has no arrays")
    if len({array.rows for array in found.values()}) != 1:
        raise Refusal(422, "arrays of the chunk have different numbers of rows")
    return found


@contextmanager
def _hdf5(file: BinaryIO) -> Iterator[h5py.File]:
    try:
        with h5py.File(file, "r") as hdf5:
            yield hdf5
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # as h5py reports what is damaged
        raise Refusal(422, f"not a readable HDF5 file: {str(error).splitlines()[0][:200]}") from None


def _is_here(hdf5: h5py.File, name: str) -> bool:
    """Whether the name is of something in this file: HDF5 has links into other files, which are not for clients."""
    parts = name.split("/")
    ways = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]  # each tells of the next only if it is here itself
    return all(isinstance(hdf5.get(way, getlink=True), h5py.HardLink) for way in ways)


def _array(hdf5: h5py.File, name: str, size: int) -> Array:
    dataset = hdf5[name] if _is_here(hdf5, name) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise Refusal(422, f"{name[:80]!r} is no array in this file")
    types = (np.dtype(np.int8),) if name.startswith("int8/") else _TYPES
    if dataset.ndim != 2 or dataset.dtype not in types or 0 in dataset.shape:
        raise Refusal(422, f"{name[:80]!r} is not [rows, width] of float32, float16 or uint16 (or int8)")
    rows, width = (int(n) for n in dataset.shape)
    step, offsets = _pieces(dataset, rows, width)
    array = Array(name, rows, width, dataset.dtype, step, offsets)
    if offsets is None:
        if step * width * dataset.dtype.itemsize > _UNPACKED_BYTES:
            raise Refusal(422, f"{name[:80]!r} has HDF5 chunks of more than {_UNPACKED_BYTES} bytes")
    elif ((offsets < 0) | (offsets + _piece_bytes(array) > size)).any():
        raise Refusal(422, f"{name[:80]!r} is cut")
    return array


def _piece_bytes(array: Array) -> np.ndarray:
    assert array.offsets is not None
    first = np.arange(len(array.offsets)) * array.step
    return np.minimum(array.step, array.rows - first) * array.row_bytes


def _pieces(dataset: h5py.Dataset, rows: int, width: int) -> tuple[int, np.ndarray | None]:
    """Rows of a piece, and where each lies; None where only h5py can tell."""
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return rows, None if offset is None else np.array([offset], np.int64)
    step, across = dataset.chunks
    count = -(-rows // step)
    if across != width or dataset.id.get_create_plist().get_nfilters() or dataset.id.get_num_chunks() != count:
        return step, None
    offsets = np.full(count, -1, np.int64)
    for i in range(count):
        info = dataset.id.get_chunk_info(i)
        if info.chunk_offset is not None and info.size == step * width * dataset.dtype.itemsize:
            offsets[info.chunk_offset[0] // step] = info.byte_offset
    return step, offsets


def _layers(layout: Layout) -> list[Array]:
    """inputs, then targets, of each layer by its number: what crosslayer-coding asks for."""
    layers = sorted({int(m[1]) for name in layout if (m := _LAYER.fullmatch(name.partition("/")[0]))})
    names = [f"layer_{layer}/{end}" for layer in layers for end in ("inputs", "targets")]
    if not names:
        raise Refusal(422, "the chunk has no layers; name sites")
    if missing := [name for name in names if name not in layout]:
        raise Refusal(422, f"the chunk has no {missing[0]}")
    return [layout[name] for name in names]


def _named(layout: Layout, sites: Sequence[str]) -> list[Array]:
    found = []
    for site in sites:
        try:
            name = dataset_name(site)
        except UserError as error:
            raise Refusal(422, str(error)) from None
        if name not in layout:
            raise Refusal(422, f"the chunk has no {name}")
        found.append(layout[name])
    return found


def _checked(rows: Sequence[int], have: int) -> np.ndarray:
    if min(rows) < 0 or max(rows) >= have:
        raise Refusal(422, f"rows: {min(rows)} to {max(rows)}; the chunk has 0 to {have - 1}")
    return np.sort(np.array(rows, dtype=np.int64))


def _read_plain(file: BinaryIO, array: Array, rows: np.ndarray) -> np.ndarray:
    assert array.offsets is not None
    out = np.empty((len(rows), array.width), array.dtype)
    piece, within = np.divmod(rows, array.step)
    cuts = np.flatnonzero((np.diff(piece) != 0) | (np.diff(rows) * array.row_bytes > _GAP_BYTES + array.row_bytes)) + 1
    for start, stop in pairwise([0, *cuts.tolist(), len(rows)]):
        first, last = int(within[start]), int(within[stop - 1])
        where = int(array.offsets[piece[start]]) + first * array.row_bytes
        raw = os.pread(file.fileno(), (last + 1 - first) * array.row_bytes, where)
        out[start:stop] = np.frombuffer(raw, array.dtype).reshape(-1, array.width)[within[start:stop] - first]
    return out


def _read_packed(file: BinaryIO, array: Array, rows: np.ndarray) -> np.ndarray:
    """Each HDF5 chunk is unpacked once for a piece of the stream, since h5py is slow at single rows."""
    out = np.empty((len(rows), array.width), array.dtype)
    block = rows // array.step
    with _UNPACKING, h5py.File(file, "r") as hdf5:
        for n in np.unique(block):
            here = block == n
            data = hdf5[array.name][n * array.step : (n + 1) * array.step]
            out[here] = data[rows[here] - n * array.step]
    return out
