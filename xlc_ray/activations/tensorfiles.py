"""Rows in the files of other programs: FILE[:COLUMN], where FILE may be a glob, gives [rows, width] block by block.

.pt, .pth          a tensor [..., width], or a mapping of names to tensors (nothing pickled is run); memory-mapped
.npy               an array [..., width]; memory-mapped. Of [rows, layers, width], COLUMN may be the number of a layer
.parquet           a column of lists, fixed_size_list, fixed_shape_tensor or fixed_size_binary; a row group at a time
.arrow, .feather   likewise, of Arrow's files and streams (those of `datasets` too); memory-mapped

Files of a glob follow each other by the numbers in their names: 2.pt before 10.pt.
"""

from __future__ import annotations

import glob
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xlc_ray.config import UserError

BLOCK = 4096
"""Rows that are read at once."""
FLOATS = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
Batches = Callable[[], Iterator[pa.Array]]


@dataclass(frozen=True)
class Rows:
    """[count, width] numbers of one dtype in files; `blocks` reads them anew, in order."""

    count: int
    width: int
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]


def find_rows(where: str, binary: str | None) -> tuple[Rows, list[str]]:
    """The rows of FILE[:COLUMN], and the files they are in. `binary`: the dtype of what fixed_size_binary holds.

    Raises UserError, one line, where there is no such file or column, or it holds something else.
    """
    pattern, column = _split(where)
    files = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern)), key=_natural)
    if not files:
        raise UserError(f"{pattern}: no such file")
    parts = []
    for file in files:
        with _reading(file):
            parts.append(_open(file, column, binary))
    for file, part in zip(files, parts, strict=True):
        if not part.width:
            raise UserError(f"{file}: rows of no numbers")
        if (part.width, part.dtype) != (parts[0].width, parts[0].dtype):
            raise UserError(
                f"{file}: rows of {part.width} {part.dtype}, {files[0]} has {parts[0].width} {parts[0].dtype}"
            )

    def blocks() -> Iterator[Tensor]:
        for file, part in zip(files, parts, strict=True):
            with _reading(file):
                yield from part.blocks()

    return Rows(sum(part.count for part in parts), parts[0].width, parts[0].dtype, blocks), files


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Whatever the libraries raise of a file that is damaged or of another kind, as one line that names it."""
    try:
        yield
    except UserError:  # which says already what and where
        raise
    except (OSError, EOFError, pa.ArrowException, NotImplementedError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{file}: cannot be read as {Path(file).suffix}: {said}") from None


def _split(where: str) -> tuple[str, str | None]:
    if Path(where).is_file():
        return where, None
    file, colon, column = where.rpartition(":")
    return (file, column) if colon and "/" not in column else (where, None)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open(file: str, column: str | None, binary: str | None) -> Rows:
    match Path(file).suffix.lower():
        case ".pt" | ".pth":
            return _of_tensor(_named(_load(file), column, file), file)
        case ".npy":

            def opened() -> Rows:
                return _of_tensor(_named(_load_npy(file), column, file), file)

            # Opened anew to be read: a map of numpy's keeps its file open.
            return replace(opened(), blocks=lambda: opened().blocks())
        case ".parquet":
            with pq.ParquetFile(file, memory_map=True) as found:
                name = _column(found.schema_arrow.names, column, file)
                rows, kind = found.metadata.num_rows, found.schema_arrow.field(name).type

            def read() -> Iterator[pa.Array]:
                with pq.ParquetFile(file, memory_map=True) as again:
                    yield from (batch.column(0) for batch in again.iter_batches(BLOCK, columns=[name]))

            return _of_arrow(rows, kind, read, binary, f"{file}:{name}")
        case ".arrow" | ".feather":
            return _of_ipc(file, column, binary)
    raise UserError(f"{file}: unknown ending; allowed: .pt, .pth, .npy, .parquet, .arrow, .feather")


# tensors -------------------------------------------------------------------------------------------------------------


def _load(file: str) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{file}: not tensors alone, or of torch before 1.6: {str(error).splitlines()[0]}") from None


def _named(found: Any, column: str | None, file: str) -> Any:
    if not isinstance(found, Mapping):
        return found if column is None else _layer(found, column, file)
    named = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    return named[_column(list(named), column, file)]


def _layer(found: Any, column: str, file: str) -> Any:
    """Of [rows, layers, width], which caches of several layers hold, the rows of one."""
    if not isinstance(found, Tensor | np.ndarray) or found.ndim != 3:
        raise UserError(f"{file}: {column}: holds no names, but {type(found).__name__}; leave out :{column}")
    if not (column.isdecimal() and int(column) < found.shape[1]):
        raise UserError(f"{file}: {column}: of shape {list(found.shape)}; allowed: 0 to {found.shape[1] - 1}")
    return found[:, int(column)]


def _load_npy(file: str) -> Any:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{file}: not an array: {error}") from None
    if not isinstance(found, np.ndarray):
        raise UserError(f"{file}: several arrays (.npz); save each as .npy")
    if found.dtype.name not in FLOATS:
        raise UserError(f"{file}: holds {found.dtype}; allowed: float16, float32, float64")
    return found


def _of_tensor(found: Any, file: str) -> Rows:
    if not isinstance(found, Tensor | np.ndarray) or found.ndim < 2:
        what = f"shape {list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise UserError(f"{file}: holds {what}; needs [rows, width]")
    name = str(found.dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise UserError(f"{file}: holds {name}; allowed: {', '.join(FLOATS)}")
    if isinstance(found, Tensor) and found.layout != torch.strided:
        raise UserError(f"{file}: holds a sparse tensor; save it dense")
    found = found.detach() if isinstance(found, Tensor) else found  # of parameters
    flat = found.reshape(-1, found.shape[-1]) if found.ndim > 2 else found  # as it lies: a copy would be whole

    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            yield part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))

    return Rows(len(flat), flat.shape[1], FLOATS[name], blocks)


# Arrow ---------------------------------------------------------------------------------------------------------------


def _of_ipc(file: str, column: str | None, binary: str | None) -> Rows:
    def record_batches() -> Iterator[pa.RecordBatch]:
        source = pa.memory_map(file)
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    try:
        batches = list(record_batches())  # of memory that is mapped
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not an Arrow file or stream: {str(error).splitlines()[0]}") from None
    if not batches:
        raise UserError(f"{file}: holds no rows")
    name = _column(batches[0].schema.names, column, file)

    def read() -> Iterator[pa.Array]:
        for batch in batches:
            whole = batch.column(name)
            yield from (whole.slice(start, BLOCK) for start in range(0, len(whole), BLOCK))

    rows = sum(batch.num_rows for batch in batches)
    return _of_arrow(rows, batches[0].schema.field(name).type, read, binary, f"{file}:{name}")


def _column(names: list[str], column: str | None, file: str) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column not in names:
        raise UserError(f"{file}: {column or 'say which'}: FILE:COLUMN; allowed: {', '.join(names) or 'none is there'}")
    return column


def _of_arrow(count: int, kind: pa.DataType, read: Batches, binary: str | None, where: str) -> Rows:
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_fixed_size_binary(kind):
        if binary is None:
            raise UserError(f"{where}: holds bytes; say of what by --binary float32, float16 or bfloat16")
        dtype = FLOATS[binary]
        if kind.byte_width % dtype.itemsize:
            raise UserError(f"{where}: {kind.byte_width} bytes are no whole number of {binary}")
        width = kind.byte_width // dtype.itemsize
    elif pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        dtype = _float_of(kind.value_type, where)
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(read, where)
    else:
        raise UserError(f"{where}: holds {kind}; needs lists of numbers, tensors or fixed_size_binary")
    return Rows(count, width, dtype, lambda: (_numbers(array, width, dtype, where) for array in read()))


def _float_of(kind: pa.DataType, where: str) -> torch.dtype:
    names = {pa.float16(): torch.float16, pa.float32(): torch.float32, pa.float64(): torch.float64}
    if kind not in names:
        raise UserError(f"{where}: lists of {kind}; allowed: float16 (halffloat), float32, float64")
    return names[kind]


def _first_length(read: Batches, where: str) -> int:
    first = next((array for array in read() if len(array)), None)
    if first is None or first[0].as_py() is None:
        raise UserError(f"{where}: the first row is empty")
    return len(first[0].as_py())


def _numbers(array: pa.Array, width: int, dtype: torch.dtype, where: str) -> Tensor:
    """One batch as [rows, width]. Raises UserError on rows that are missing or of another length."""
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    if array.null_count:
        raise UserError(f"{where}: has rows without a value")
    if pa.types.is_fixed_size_binary(array.type):
        size = array.type.byte_width
        raw = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * size :][: len(array) * size]
        return torch.from_numpy(raw.copy()).view(dtype).reshape(len(array), width)
    if not pa.types.is_fixed_size_list(array.type) and (array.value_lengths().to_numpy() != width).any():
        raise UserError(f"{where}: has rows that are not {width} long, as the first is")
    values = array.flatten()
    if values.null_count:
        raise UserError(f"{where}: has numbers without a value")
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False))).reshape(len(array), width)
