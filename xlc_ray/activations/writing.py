"""Writing a store, so that an interrupted job goes on where it was and never mixes two settings.

identity.json         every setting that decides the content; a rerun with another one is refused
text/chunk_{i}.npz    token windows and the (window, position) of each row;  text/plan.json: all of them are there
chunk_{i}.hdf5        activations;  moments/chunk_{i}.npz;  records/chunk_{i}.json last: the chunk is complete
manifest.json         last of all: the store is complete.  Beside it statistics.json, and what crosslayer-coding
                      reads: index.bin, metadata.json, norm_stats.json
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from xlc_ray import files
from xlc_ray.activations import chunkfile, compact, foreign, lossless
from xlc_ray.activations.manifest import FORMAT_VERSION, ChunkRecord, Manifest, Moments
from xlc_ray.activations.sites import of_base
from xlc_ray.activations.windows import ChunkText, Windows
from xlc_ray.config import Config, UserError
from xlc_ray.web import SCHEMES

T = TypeVar("T")

_AT_ONCE = 16  # requests
_BLOCK = 2048  # rows that are float64 at a time
_MOMENTS = [field.name for field in fields(Moments)]


def identity(config: Config, widths: Mapping[str, int], held_out: bool) -> dict[str, Any]:
    """Every setting that decides what a store holds. `widths`: {site: width}; `held_out`: which share of the text."""
    make, base = config.generate, None
    if config.base_model and any(map(of_base, widths)):
        base = config.base_model.model_dump(mode="json", exclude={"trust_remote_code"})
    return {
        "format_version": FORMAT_VERSION,
        "model": config.model.model_dump(mode="json", exclude={"trust_remote_code"}),
        "text": config.text.model_dump(mode="json", exclude={"streaming"}),
        "held_out": held_out,
        "sites": dict(widths),
        **({"base_model": base} if base else {}),
        "dtype": make.dtype,
        "seed": config.seed,
        "tokens": make.held_out_tokens if held_out else make.tokens,
        "chunk_tokens": make.chunk_tokens,
        "documents_per_task": make.documents_per_task,
    }


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A hash of an identity."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def begin(path: str, identity: Mapping[str, Any]) -> None:
    """Claim a directory for this content. Raises UserError where it holds, or was begun with, another."""
    if identity["dtype"] == lossless.DTYPE and path.startswith(SCHEMES):
        raise UserError(
            f"{path}: a server cannot give rows of {lossless.DTYPE}; allowed there: bfloat16, float16, float32"
        )
    name = files.join(path, "identity.json")
    if files.exists(name):
        compare(path, files.read_mapping(name), identity)
        return
    if any(files.exists(files.join(path, other)) for other in ("manifest.json", "index.bin")):
        raise UserError(f"{path}: holds activations of another origin; choose another path")
    files.makedirs(path)
    files.write_json(name, dict(identity))


def compare(path: str, made: Mapping[str, Any], asked: Mapping[str, Any], parts: tuple[str, ...] = ("",)) -> None:
    """Raises UserError where the identity with which `path` was made differs from another, in settings whose names
    begin with one of `parts`: of all differences the first is named, sizes last."""
    before, now = _flat(made), _flat(asked)
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key.startswith("bytes."), key)):
        if key.startswith(parts) and before.get(key) != now.get(key):
            name, values = key.removeprefix("bytes."), f"{before.get(key)!r}, not {now.get(key)!r}"
            what = f"{key} = {values}" if name == key else f"another {name}: bytes of its files = {values}"
            raise UserError(f"{path}: was made with {what}; choose another path or remove it")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def write_text(path: str, chunk: ChunkText) -> None:
    """Write the text of one chunk."""
    buffer = io.BytesIO()
    windows = chunk.windows
    arrays = {
        "tokens": windows.tokens,
        "length": windows.length,
        "window": chunk.row_window,
        "position": chunk.row_position,
    }
    np.savez_compressed(buffer, **arrays)
    files.write_bytes(_text_file(path, chunk.index), buffer.getvalue())


def read_text(path: str, index: int) -> ChunkText:
    """The text of one chunk. Raises UserError where the store has none, or its file is damaged."""
    name = _text_file(path, index)
    try:
        raw = files.read_bytes(name)
    except FileNotFoundError:
        raise UserError(f"{name}: missing; this store does not know the text of its rows") from None
    found = _arrays(name, raw)
    return ChunkText(index, Windows(found["tokens"], found["length"]), found["window"], found["position"])


def _arrays(name: str, raw: bytes) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(raw)) as found:
            return dict(found)
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{name}: cannot be read as .npz: {error}; copy it again, or generate to another path"
        ) from None


def remove_text(path: str) -> None:
    """Remove the text of a store that has no plan, and nothing else that may lie there."""
    for name in files.listdir(files.join(path, "text")):
        if re.fullmatch(r"chunk_\d+\.npz", name):
            files.remove(files.join(path, "text", name))


def _text_file(path: str, index: int) -> str:
    return files.join(path, "text", f"chunk_{index}.npz")


def write_plan(path: str, rows: Sequence[int]) -> None:
    """Say that the text of all chunks is written, and how many rows each has."""
    files.write_json(files.join(path, "text", "plan.json"), {"rows": list(rows)})


def read_plan(path: str) -> list[int] | None:
    """Rows of each chunk; None until `write_plan`."""
    name = files.join(path, "text", "plan.json")
    return files.read_mapping(name)["rows"] if files.exists(name) else None


def write_chunk(
    path: str,
    index: int,
    arrays: Mapping[str, np.ndarray],
    dtype: str,
    beside: Mapping[str, np.ndarray] | None = None,
) -> ChunkRecord:
    """Write the activations of one chunk: {site: [rows, width]} as `encode` makes them for `dtype`, in row order.

    `beside`: what else its file is to hold (chunkfile.write). Raises UserError on activations that are not finite.
    """
    moments: dict[str, Moments] = {}
    stored: dict[str, chunkfile.Stored] = {}
    for site, array in arrays.items():
        stored[site], found = _stored(array, dtype)
        moments[site] = found
        if not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
            raise UserError(f"{path}: chunk {index}: {site} has values that are not finite; try model.dtype float32")
    with files.writing(files.join(path, f"chunk_{index}")):
        record = chunkfile.write(path, index, stored, beside)
    buffer = io.BytesIO()
    np.savez(
        buffer, **{f"{site}/{key}": value for site, found in moments.items() for key, value in vars(found).items()}
    )
    files.write_bytes(_moments_file(path, index), buffer.getvalue())
    files.write_json(_record_file(path, index), record.model_dump())
    return record


def _stored(array: np.ndarray, dtype: str) -> tuple[chunkfile.Stored, Moments]:
    """What is written of an array, and the moments of what will be read."""
    if dtype == lossless.DTYPE:
        return lossless.squeeze(array), moments_of(array, dtype)
    if dtype != "int8" or not np.isfinite(array).all():
        return array, moments_of(array, dtype)
    packed = compact.pack(array)
    kept = compact.unpack(packed)
    error = array - kept
    lost = float(np.einsum("nd,nd->", error, error, dtype=np.float64))
    return packed, replace(moments_of(kept, dtype), lost=lost)


def moments_of(array: np.ndarray, dtype: str) -> Moments:
    """Moments of what is stored (not of what was rounded to it)."""
    total: Moments | None = None
    for start in range(0, len(array), _BLOCK):
        # Values that are not finite are the caller's to report; numpy need not warn of them.
        with np.errstate(invalid="ignore", over="ignore"):
            block = Moments.of(chunkfile.decode(array[start : start + _BLOCK], dtype).numpy().astype(np.float64))
            total = total.merge(block) if total else block
    assert total is not None, "a chunk has rows"
    return total


def _record_file(path: str, index: int) -> str:
    return files.join(path, "records", f"chunk_{index}.json")


def _moments_file(path: str, index: int) -> str:
    return files.join(path, "moments", f"chunk_{index}.npz")


def missing_chunks(path: str, n: int) -> list[int]:
    """Which of chunks 0 … n-1 are not complete: no record, or a file of another size than it says."""
    there = complete_chunks(path, n)
    return [index for index in range(n) if index not in there]


def complete_chunks(path: str, n: int) -> dict[int, ChunkRecord]:
    """{index: record} of those of chunks 0 … n-1 that are complete, in order."""
    recorded = set(files.listdir(files.join(path, "records")))

    def look(index: int) -> ChunkRecord | None:
        record = read_record(path, index)
        return record if files.size(files.join(path, record.file)) == record.bytes else None

    asked = [index for index in range(n) if f"chunk_{index}.json" in recorded]
    return {record.index: record for record in _each(path, look, asked) if record}


def read_record(path: str, index: int) -> ChunkRecord:
    """What is known of a complete chunk."""
    return ChunkRecord.model_validate(files.read_mapping(_record_file(path, index)))


def _each(path: str, read: Callable[[int], T], indices: Sequence[int]) -> Iterator[T]:
    """What `read` gives for each index, in order; at a URL, where each waits for its answer, several at once."""
    if not files.is_url(path):
        yield from map(read, indices)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(indices), _AT_ONCE):  # no more are held
            yield from pool.map(read, indices[start : start + _AT_ONCE])


def finish(path: str, identity: Mapping[str, Any]) -> Manifest:
    """Merge the chunks' records into the manifest and statistics. Raises UserError unless every chunk is there."""
    plan = read_plan(path)
    if plan is None:
        raise UserError(f"{path}: its text is not complete; generate again")
    there = complete_chunks(path, len(plan))
    if missing := [index for index in range(len(plan)) if index not in there]:
        names = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise UserError(f"{path}: {len(missing)} of {len(plan)} chunks are missing ({names}); generate again")
    chunks = tuple(there.values())
    assert [chunk.rows for chunk in chunks] == plan, "chunks hold the rows that were planned"
    total = merged_moments(path, chunks)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        sites=dict(identity["sites"]),
        dtype=identity["dtype"],
        chunks=chunks,
        tokens=sum(plan),
        model=identity["model"]["name"],
        fingerprint=fingerprint(identity),
        identity=dict(identity),
        lost={site: m.lost / (m.m2.sum() or 1.0) for site, m in total.items()} if identity["dtype"] == "int8" else {},
    )
    _write_statistics(path, total)
    if manifest.dtype not in ("int8", lossless.DTYPE):  # which other programs cannot read
        foreign.write_beside(path, manifest, total)
    for name in files.listdir(path):
        if name.startswith(chunkfile.PARTIAL):  # of writers that were killed
            files.remove(files.join(path, name))
    files.write_bytes(files.join(path, "manifest.json"), manifest.model_dump_json().encode())
    return manifest


def names(manifest: Manifest) -> list[str]:
    """What may stand in the directory of a complete store, ours or crosslayer-coding's; chunk files do. What says that
    it is complete comes last: manifest.json, where it has one."""
    found = [chunk.file for chunk in manifest.chunks]
    for chunk in manifest.chunks:
        found += [_text_file("", chunk.index), _moments_file("", chunk.index), _record_file("", chunk.index)]
    found += ["text/plan.json", "identity.json", "statistics.json", "metadata.json", "norm_stats.json"]
    return [*(name.lstrip("/") for name in found), "index.bin", "manifest.json"]


def merged_moments(path: str, chunks: Sequence[ChunkRecord]) -> dict[str, Moments]:
    """Moments of each site over chunks."""
    total: dict[str, Moments] = {}
    blobs = _each(path, lambda index: files.read_bytes(_moments_file(path, index)), [chunk.index for chunk in chunks])
    for chunk, blob in zip(chunks, blobs, strict=True):
        found = _arrays(_moments_file(path, chunk.index), blob)
        for site in chunk.offsets:
            values = {key: found[f"{site}/{key}"] for key in _MOMENTS}
            here = Moments(**values | {key: values[key].item() for key in ("count", "norm_sum", "lost")})
            total[site] = total[site].merge(here) if site in total else here
    return total


def _write_statistics(path: str, moments: Mapping[str, Moments]) -> None:
    found = {site: vars(m.statistics()) for site, m in moments.items()}
    tree = {site: s | {"mean": s["mean"].tolist(), "std": s["std"].tolist()} for site, s in found.items()}
    files.write_bytes(files.join(path, "statistics.json"), json.dumps(tree).encode())
