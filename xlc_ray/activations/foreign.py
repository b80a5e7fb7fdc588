"""Stores as crosslayer-coding knows them: chunk files, index.bin, metadata.json, norm_stats.json, and no manifest.

`index.bin` is either one record a chunk (chunk_id <i4, num_tokens <i4, offset <i8) or, older, one a row
(two uint32: chunk_id, row). They are told apart by their size and the total in metadata.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xlc_ray import files
from xlc_ray.activations.chunkfile import open_hdf5
from xlc_ray.activations.manifest import ChunkRecord, Manifest, Moments, SiteStatistics
from xlc_ray.config import UserError

INDEX_RECORD = np.dtype([("chunk_id", "<i4"), ("num_tokens", "<i4"), ("offset", "<i8")])
_ENDS = {"inputs": "mlp_in", "targets": "mlp_out"}


def read_manifest(path: str) -> Manifest:
    """The manifest that such a store would have. Raises UserError naming the file that is missing or inconsistent."""
    if files.is_url(path):
        raise UserError(f"{path}: a store without manifest.json is read from a local directory only; copy it first")
    metadata = check_metadata(files.read_mapping(files.join(path, "metadata.json")), f"{path}/metadata.json")
    name = files.join(path, "index.bin")
    try:
        raw = files.read_bytes(name)
    except FileNotFoundError:
        raise UserError(f"{name}: missing") from None
    chunks = [_record(path, index, rows) for index, rows in parse_index(raw, metadata["total_tokens"], name)]
    sites, dtype = _layout(files.join(files.local(path), chunks[0].file))
    layers = len({site.split(".")[1] for site in sites})
    for key, found in (("num_layers", layers), ("d_model", next(iter(sites.values())))):
        if metadata[key] != found:
            raise UserError(f"{path}/metadata.json: {key} is {metadata[key]}, but {chunks[0].file} has {found}")
    return Manifest(
        format_version=0,
        sites=sites,
        dtype=dtype,
        chunks=tuple(chunk.model_copy(update={"offsets": dict.fromkeys(sites)}) for chunk in chunks),
        tokens=metadata["total_tokens"],
        model=str(metadata.get("model_name", "unknown")),
        fingerprint=None,
        identity={},
    )


def read_statistics(path: str, manifest: Manifest) -> dict[str, SiteStatistics]:
    """Statistics of every site from norm_stats.json. Raises UserError where one is missing or of another width."""
    name = files.join(path, "norm_stats.json")
    return parse_statistics(files.read_mapping(name), manifest, name)


def parse_statistics(stats: Mapping[str, Any], manifest: Manifest, name: str) -> dict[str, SiteStatistics]:
    """The same from the content of norm_stats.json; `name` is what errors call it."""
    found = {}
    for site, width in manifest.sites.items():
        kind, layer = site.split(".")
        end = {"mlp_in": "inputs", "mlp_out": "targets"}[kind]
        entry = (stats.get(layer) or {}).get(end) or {}
        mean, std = (_vector(entry.get(key), width, f"{name}: {layer}.{end}.{key}") for key in ("mean", "std"))
        if (std < 0).any():
            raise UserError(f"{name}: {layer}.{end}.std has negative values")
        found[site] = SiteStatistics(manifest.tokens, mean, std, None)
    return found


def _vector(values: Any, width: int, where: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != width:
        raise UserError(f"{where}: missing or not {width} numbers")
    try:
        vector = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{where}: not {width} numbers") from None
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise UserError(f"{where}: not {width} finite numbers")
    return vector


def check_metadata(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    """The content of metadata.json. Raises UserError where it lacks a number that is needed."""
    for key in ("num_layers", "d_model", "total_tokens"):
        if not isinstance(metadata.get(key), int):
            raise UserError(f"{name}: {key} is missing or no whole number")
    return metadata


def parse_index(raw: bytes, total: int, name: str) -> list[tuple[int, int]]:
    """(chunk, rows) of each chunk in an index.bin, by number. Raises UserError where it is not of `total` rows."""
    if raw and len(raw) % INDEX_RECORD.itemsize == 0:
        records = np.frombuffer(raw, INDEX_RECORD)
        if records["num_tokens"].sum(dtype=np.int64) == total and (records["num_tokens"] > 0).all():
            return sorted((int(r["chunk_id"]), int(r["num_tokens"])) for r in records)
    if raw and len(raw) == 8 * total:
        chunk, row = np.frombuffer(raw, "<u4").reshape(-1, 2).T
        ids, which, counts = np.unique(chunk, return_inverse=True, return_counts=True)
        largest = np.zeros(len(ids), row.dtype)
        np.maximum.at(largest, which, row)
        distinct = len(np.unique(chunk.astype(np.uint64) << np.uint64(32) | row)) == total
        if distinct and (largest < counts).all():
            return [(int(i), int(n)) for i, n in zip(ids, counts, strict=True)]
    raise UserError(f"{name}: does not describe the {total} tokens of metadata.json")


def _record(path: str, index: int, rows: int) -> ChunkRecord:
    for name in (f"chunk_{index}.hdf5", f"chunk_{index}.h5"):
        file = Path(files.local(path)) / name
        if file.is_file():
            size = file.stat().st_size
            return ChunkRecord(index=index, file=name, rows=rows, bytes=size, checksum=None, offsets={})
    raise UserError(f"{path}/chunk_{index}.hdf5: the chunk is missing")


def _layout(path: str) -> tuple[dict[str, int], str]:
    """Sites with their widths, by layer number, and the type of what is stored."""
    widths, kinds = {}, set()
    with open_hdf5(path) as file:
        groups = sorted((int(name[6:]), name) for name in file if name.startswith("layer_") and name[6:].isdecimal())
        for layer, name in groups:
            for end, kind in _ENDS.items():
                dataset = file.get(f"{name}/{end}")
                if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 2:
                    raise UserError(f"{path}: {name}/{end} is missing or not [rows, width]")
                widths[f"{kind}.{layer}"] = int(dataset.shape[1])
                kinds.add(str(dataset.dtype))
    dtype = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}.get(
        kinds.pop() if len(kinds) == 1 else ""
    )
    if dtype is None:
        raise UserError(
            f"{path}: needs datasets layer_*/inputs and layer_*/targets of one type: float32, float16 or uint16"
        )
    return widths, dtype


def write_beside(path: str, manifest: Manifest, moments: Mapping[str, Moments]) -> None:
    """index.bin, norm_stats.json and metadata.json, by which crosslayer-coding reads the MLP sites of ours."""
    rows = np.array([chunk.rows for chunk in manifest.chunks], dtype=np.int64)
    index = np.zeros(len(rows), INDEX_RECORD)
    index["chunk_id"], index["num_tokens"], index["offset"] = np.arange(len(rows)), rows, np.cumsum(rows) - rows
    files.write_bytes(files.join(path, "index.bin"), index.tobytes())
    stats: dict[str, dict[str, Any]] = {}
    for site, found in moments.items():
        kind, layer = site.split(".")  # of the base model: "2@base", which is no layer to other programs
        if layer.isdecimal() and (end := {"mlp_in": "inputs", "mlp_out": "targets"}.get(kind)):
            s = found.statistics()
            stats.setdefault(layer, {})[end] = {"mean": s.mean.tolist(), "std": s.std.tolist()}
    files.write_bytes(files.join(path, "norm_stats.json"), json.dumps(stats).encode())
    settings = manifest.identity
    text = settings.get("text", {"dataset": "imported", "split": None})
    metadata = {
        "model_name": manifest.model,
        "dataset": text["dataset"],
        "split": text["split"],
        "num_layers": len(stats),
        "d_model": next(iter(manifest.sites.values())),
        "dtype": manifest.dtype,
        "total_tokens": manifest.tokens,
        "chunk_tokens": settings["chunk_tokens"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    files.write_json(files.join(path, "metadata.json"), metadata)
