"""The bytes of one chunk: an HDF5 file of arrays [rows, width], one a site, contiguous and uncompressed.

`layer_{l}/inputs` and `layer_{l}/targets` hold mlp_in.l and mlp_out.l (crosslayer-coding's layout), `sites/<name>` any
other site. bfloat16 is kept as its bits in uint16, since neither numpy nor HDF5 knows it: `encode` and `decode` are the
only places that turn numbers into arrays and back. int8 is float32 in memory; on disk it is `int8/<name>/values` and
`side` (compact.py), out of the way of programs that would take it for numbers.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import torch
import xxhash

from xlc_ray import files
from xlc_ray.activations.compact import Packed
from xlc_ray.activations.manifest import ChunkRecord, Span
from xlc_ray.activations.sites import of_base, parse
from xlc_ray.config import UserError
from xlc_ray.web import ServedFileSystem

T = TypeVar("T")

_STORED = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
_STORED["int8"] = _STORED["float32"]
PARTIAL = ".chunk_"  # of a writer at work, or of one that was killed
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between reads that fail
_CHECKED: dict[str, tuple[int, int, int]] = {}
_OPEN_FILES = 64  # bounds descriptors and maps: a store may have thousands of chunks


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy type of arrays of float32, float16, bfloat16 (uint16 bits) or int8 (float32)."""
    return _STORED[dtype]


def on_disk(dtype: str) -> np.dtype:
    """The same, as it lies in a file."""
    return np.dtype(np.int8) if dtype == "int8" else _STORED[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """What holds any number of a store of this type, and no more."""
    return torch.float32 if dtype == "int8" else getattr(torch, dtype)


def encode(values: torch.Tensor, dtype: str, where: str) -> np.ndarray:
    """A tensor as such an array. Raises UserError, naming `where`, if a finite value becomes infinite."""
    stored = values.to(torch_dtype(dtype))
    if dtype == "float16" and bool((stored.isinf() & ~values.isinf()).any()):
        largest = float(values.abs().max())
        raise UserError(f"generate.dtype: float16 cannot hold {largest:.3g} at {where}; allowed: bfloat16, float32")
    stored = stored.cpu().contiguous()
    return stored.view(torch.uint16).numpy() if dtype == "bfloat16" else stored.numpy()


def decode(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array as a float32 tensor."""
    return as_tensor(array, dtype).float()


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array as a tensor of the type that it holds, of the same memory if that may be written to."""
    assert array.dtype == _STORED[dtype], f"{array.dtype} is not how {dtype} is stored"
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W", "A"]))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dataset_name(site: str) -> str:
    """Where a site's array stands in a chunk file, but for int8."""
    kind, layer = parse(site)
    shared = {} if of_base(site) else {"mlp_in": f"layer_{layer}/inputs", "mlp_out": f"layer_{layer}/targets"}
    return shared.get(kind, f"sites/{site}")


def _place(site: str, dtype: str) -> str:
    return f"int8/{site}/values" if dtype == "int8" else dataset_name(site)


def write(directory: str, index: int, arrays: Mapping[str, np.ndarray | Packed]) -> ChunkRecord:
    """Write `chunk_{index}.hdf5`, whole or not at all, and say what was written."""
    name = f"chunk_{index}.hdf5"
    target = files.join(directory, name)
    rows = {len(array.values if isinstance(array, Packed) else array) for array in arrays.values()}
    assert len(rows) == 1, "every site has the same rows"
    files.makedirs(directory)
    # Beside the target, so that the rename stays on one file system.
    parent = None if files.is_url(directory) else files.local(directory)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent) as place:
        partial = Path(place) / f"{name}.part"
        offsets, sides = _write_hdf5(partial, arrays)
        record = ChunkRecord(
            index=index,
            file=name,
            rows=rows.pop(),
            bytes=partial.stat().st_size,
            checksum=checksum(str(partial)),
            offsets=offsets,
            sides=sides,
        )
        if files.is_url(directory):
            files.send(partial, target)
        else:
            partial.replace(files.local(target))
    return record


def _write_hdf5(path: Path, arrays: Mapping[str, np.ndarray | Packed]) -> tuple[dict[str, int | None], dict[str, int]]:
    offsets: dict[str, int | None] = {}
    sides: dict[str, int] = {}
    with h5py.File(path, "w") as file:

        def put(name: str, array: np.ndarray) -> int:
            offset = file.create_dataset(name, data=array, track_times=False).id.get_offset()
            assert offset is not None, "a contiguous dataset has an offset"
            return offset

        for site, array in arrays.items():
            if isinstance(array, Packed):
                offsets[site] = put(_place(site, "int8"), array.values)
                sides[site] = put(f"int8/{site}/side", array.side)
            else:
                offsets[site] = put(dataset_name(site), array)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return offsets, sides


def checksum(path: str) -> str:
    """XXH3 of a file or URL, in hexadecimal. Our own server is asked for it; all else is read whole."""
    fs, inner = files.filesystem(path)
    if isinstance(fs, ServedFileSystem):
        return fs.xxh3(inner)

    def read() -> str:
        digest = xxhash.xxh3_64()
        with fs.open(inner, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    return files.again(path, read)


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
    """Bytes of a local chunk file, mapped. As patient as `scatter`, and raises as it does."""
    return _patiently(path, patience, lambda: _mapped(path, _identity(path, span.record.bytes))[span.start : span.stop])


def _patiently(path: str, patience: float, read: Callable[[], T]) -> T:
    until, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return read()
        except OSError as error:
            if time.monotonic() + pause > until:
                missing = isinstance(error, FileNotFoundError)
                what = "the chunk is missing" if missing else f"the chunk cannot be read: {error.strerror or error}"
                raise UserError(f"{path}: {what}" + f" (tried for {patience:g} s)" * (patience > 0)) from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


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
    if _CHECKED.get(path) != identity:
        _check_file(path, record, widths, dtype)
        _CHECKED[path] = identity
    for site, values in out.items():
        offset, width = record.offsets[site], widths[site]
        if offset is None:
            dataset = check_dataset(_hdf5(path, identity), path, site, (record.rows, width), dtype)
            _scatter_hdf5(dataset, rows, to, values)
            continue
        stored = on_disk(dtype)
        raw = _mapped(path, identity)[offset : offset + record.rows * width * stored.itemsize]
        values[to] = raw.view(stored).reshape(record.rows, width)[rows]


def _check_file(path: str, record: ChunkRecord, widths: Mapping[str, int], dtype: str) -> None:
    """Once a file and process: maps go by offsets, so that another file of the same size would give any numbers."""
    with open_hdf5(path) as file:
        for site, offset in record.offsets.items():
            dataset = check_dataset(file, path, site, (record.rows, widths[site]), dtype)
            if offset is not None and dataset.id.get_offset() != offset:
                raise UserError(
                    f"{path}: {_place(site, dtype)} is not where the manifest says; generate this chunk again"
                )


def _identity(path: str, expected: int) -> tuple[int, int, int]:
    # Part of the caches' keys: a file that was replaced is never served from an old map.
    status = os.stat(path)
    if status.st_size != expected:
        raise UserError(f"{path}: cut or altered: {status.st_size} bytes where the manifest says {expected}")
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=_OPEN_FILES)
def _mapped(path: str, identity: tuple[int, int, int]) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r")


@lru_cache(maxsize=_OPEN_FILES)
def _hdf5(path: str, identity: tuple[int, int, int]) -> h5py.File:
    return open_hdf5(path)


def open_hdf5(path: str) -> h5py.File:
    """A local HDF5 file, for reading. Raises UserError where it is none, OSError where the file system fails."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno:
            raise
        raise UserError(f"{path}: not a readable HDF5 file: {str(error).splitlines()[0]}") from None


def check_dataset(file: h5py.File, path: str, site: str, shape: Sequence[int], dtype: str) -> h5py.Dataset:
    """A site's dataset in an open file. Raises UserError where it is missing or of another shape or type."""
    name = _place(site, dtype)
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: has no dataset {name}")
    if dataset.shape != tuple(shape):
        raise UserError(f"{path}: {name} has shape {list(dataset.shape)} where the store says {list(shape)}")
    if dataset.dtype != on_disk(dtype):
        raise UserError(f"{path}: {name} holds {dataset.dtype} where the store says {on_disk(dtype)} ({dtype})")
    return dataset


def _scatter_hdf5(dataset: h5py.Dataset, rows: np.ndarray, to: np.ndarray, values: np.ndarray) -> None:
    """Slices only (h5py's fancy indexing is slow); each compressed HDF5 chunk is unpacked once."""
    step = dataset.chunks[0] if dataset.chunks else 1024
    block = rows // step
    for first in np.unique(block):
        here = block == first
        try:
            data = dataset[first * step : (first + 1) * step]
        except OSError as error:
            raise UserError(
                f"{dataset.file.filename}: {dataset.name} cannot be read: {str(error).splitlines()[0]}"
            ) from None
        values[to[here]] = data[rows[here] - first * step]
