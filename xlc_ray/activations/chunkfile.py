"""The bytes of one chunk: an HDF5 file of arrays [rows, width], one a site, contiguous and uncompressed.

`layer_{l}/inputs` and `layer_{l}/targets` hold mlp_in.l and mlp_out.l (crosslayer-coding's layout), `sites/<name>` any
other site. bfloat16 is kept as its bits in uint16, since neither numpy nor HDF5 knows it: `encode` and `decode` are the
only places that turn numbers into arrays and back. int8 is float32 in memory, bfloat16_zstd bfloat16; on disk they are
`int8/<name>/values` and `side` (compact.py), and `zstd/<name>/values` and `side` (lossless.py), out of the way of
programs that would take them for numbers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
import xxhash

from xlc_ray import files
from xlc_ray.activations import lossless
from xlc_ray.activations.compact import Packed
from xlc_ray.activations.lossless import Squeezed
from xlc_ray.activations.manifest import ChunkRecord
from xlc_ray.activations.sites import of_base, parse
from xlc_ray.config import UserError
from xlc_ray.web import ServedFileSystem

_STORED = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
_STORED |= {"int8": _STORED["float32"], lossless.DTYPE: _STORED["bfloat16"]}
Stored = np.ndarray | Packed | Squeezed
"""The rows of a site, as they go into a file."""
PARTIAL = ".chunk_"  # of a writer at work, or of one that was killed


def stored_dtype(dtype: str) -> np.dtype:
    """The numpy type of arrays of float32, float16, bfloat16 and bfloat16_zstd (uint16 bits) or int8 (float32)."""
    return _STORED[dtype]


def on_disk(dtype: str) -> np.dtype:
    """The same, as it lies in a file."""
    return np.dtype(np.int8) if dtype == "int8" else _STORED[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """What holds any number of a store of this type, and no more."""
    return torch.float32 if dtype == "int8" else getattr(torch, dtype.removesuffix("_zstd"))


def encode(values: torch.Tensor, dtype: str, where: str) -> np.ndarray:
    """A tensor as such an array. Raises UserError, naming `where`, if a finite value becomes infinite."""
    stored = values.to(torch_dtype(dtype))
    if dtype == "float16" and bool((stored.isinf() & ~values.isinf()).any()):
        largest = float(values.abs().max())
        raise UserError(f"generate.dtype: float16 cannot hold {largest:.3g} at {where}; allowed: bfloat16, float32")
    stored = stored.cpu().contiguous()
    return stored.view(torch.uint16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


def decode(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array as a float32 tensor."""
    return as_tensor(array, dtype).float()


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A stored array as a tensor of the type that it holds, of the same memory if that may be written to."""
    assert array.dtype == _STORED[dtype], f"{array.dtype} is not how {dtype} is stored"
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W", "A"]))
    return tensor.view(torch_dtype(dtype)) if tensor.dtype == torch.uint16 else tensor


def dataset_name(site: str) -> str:
    """Where a site's array stands in a chunk file, but for int8 and bfloat16_zstd."""
    kind, layer = parse(site)
    shared = {} if of_base(site) else {"mlp_in": f"layer_{layer}/inputs", "mlp_out": f"layer_{layer}/targets"}
    return shared.get(kind, f"sites/{site}")


def place(site: str, dtype: str) -> str:
    """Where a site's array [rows, width] stands in a chunk file of a store of this type, but for bfloat16_zstd."""
    return f"int8/{site}/values" if dtype == "int8" else dataset_name(site)


def write(
    directory: str, index: int, arrays: Mapping[str, Stored], beside: Mapping[str, np.ndarray] | None = None
) -> ChunkRecord:
    """Write `chunk_{index}.hdf5`, whole or not at all, and say what was written. `beside`: arrays that are of no site,
    by names that no site has."""
    name = f"chunk_{index}.hdf5"
    target = files.join(directory, name)
    rows = {array.rows if isinstance(array, (Packed, Squeezed)) else len(array) for array in arrays.values()}
    assert len(rows) == 1, "every site has the same rows"
    files.makedirs(directory)
    # Beside the target, so that the rename stays on one file system.
    parent = None if files.is_url(directory) else files.local(directory)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent) as place:
        partial = Path(place) / f"{name}.part"
        offsets, sides = _write_hdf5(partial, arrays, beside or {})
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


def _write_hdf5(
    path: Path, arrays: Mapping[str, Stored], beside: Mapping[str, np.ndarray]
) -> tuple[dict[str, int | None], dict[str, int]]:
    offsets: dict[str, int | None] = {}
    sides: dict[str, int] = {}
    with h5py.File(path, "w") as file:

        def put(name: str, array: np.ndarray) -> int:
            offset = file.create_dataset(name, data=array, track_times=False).id.get_offset()
            assert offset is not None, "a contiguous dataset has an offset"
            return offset

        for site, array in arrays.items():
            if isinstance(array, (Packed, Squeezed)):
                group = "int8" if isinstance(array, Packed) else "zstd"
                offsets[site] = put(f"{group}/{site}/values", array.values)
                sides[site] = put(f"{group}/{site}/side", array.side)
            else:
                offsets[site] = put(dataset_name(site), array)
        for name, array in beside.items():
            sides[name] = put(name, array)
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
    name = place(site, dtype)
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: has no dataset {name}")
    if dataset.shape != tuple(shape):
        raise UserError(f"{path}: {name} has shape {list(dataset.shape)} where the store says {list(shape)}")
    if dataset.dtype != on_disk(dtype):
        raise UserError(f"{path}: {name} holds {dataset.dtype} where the store says {on_disk(dtype)} ({dtype})")
    return dataset
