"""Rows of a store on a server, by the slices of crosslayer-coding's protocol: a request a chunk, several at once.

Our own stores are opened by the files of that server, and their slices name the sites that are wanted. Of any other
dataset the server says what it is (info, manifest, norm_stats), and a slice is inputs and targets of all layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from xlc_ray import files
from xlc_ray.activations import foreign
from xlc_ray.activations.manifest import ChunkRecord, Manifest, SiteStatistics
from xlc_ray.config import UserError
from xlc_ray.web import ServedFileSystem

_ROWS = 8192  # of a request, at most
_ANSWER = 8 << 20  # bytes, at most, but for a row
_REQUESTS = 8  # at once
_DTYPES = ("float32", "float16", "bfloat16")


def fill(
    path: str, manifest: Manifest, chunk: np.ndarray, row: np.ndarray, to: np.ndarray, out: dict[str, np.ndarray]
) -> None:
    """Copy rows (sorted by chunk and row) to rows `to` of each site's array in `out`. Raises UserError."""
    fs, dataset = _served(path)
    ours = manifest.fingerprint is not None
    sites = list(out) if ours else list(manifest.sites)
    row_bytes = sum(manifest.sites[site] for site in sites) * next(iter(out.values())).itemsize
    most = min(_ROWS, max(1, _ANSWER // row_bytes))
    cuts = np.flatnonzero(np.diff(chunk)) + 1
    parts = [
        part[start : start + most]
        for part in np.split(np.arange(len(row)), cuts)
        for start in range(0, len(part), most)
    ]

    def copy(part: np.ndarray) -> None:
        record, rows = manifest.chunks[chunk[part[0]]], row[part]
        try:
            blob = fs.slice(dataset, record.index, rows.tolist(), sites if ours else None)
        except FileNotFoundError:
            raise UserError(f"{path}: chunk {record.index} is missing") from None
        _spread(blob, f"{path}: chunk {record.index}", manifest, sites, to[part], out)

    with ThreadPoolExecutor(_REQUESTS) as pool:
        asked: list[Future[None]] = [pool.submit(copy, part) for part in parts]
        try:
            for one in asked:
                one.result()
        finally:
            for one in asked:
                one.cancel()


def _spread(
    blob: bytes, where: str, manifest: Manifest, sites: Sequence[str], to: np.ndarray, out: dict[str, np.ndarray]
) -> None:
    """The arrays of a slice, one after another, each to its rows of `out`."""
    size = next(iter(out.values())).itemsize
    spans = np.cumsum([0, *(len(to) * manifest.sites[site] * size for site in sites)])
    if len(blob) != spans[-1]:
        raise UserError(
            f"{where}: the server sent {len(blob)} bytes of {len(to)} rows where {spans[-1]} were asked for"
        )
    for site, start, stop in zip(sites, spans, spans[1:], strict=False):
        if site in out:
            values = out[site]
            values[to] = np.frombuffer(blob[start:stop], values.dtype).reshape(len(to), -1)


def read_manifest(path: str) -> Manifest | None:
    """What the server knows of a dataset that is no store of ours; None where there is none. Raises UserError."""
    fs, dataset = _served(path)
    try:
        metadata = foreign.check_metadata(_object(fs, dataset, "info"), f"{path}: info")
        raw = fs.web.ask("GET", f"{fs.route(dataset)}/manifest")
    except FileNotFoundError:
        return None
    layers = sorted(map(int, _statistics(path)))
    if len(layers) != metadata["num_layers"]:
        raise UserError(f"{path}: info: num_layers is {metadata['num_layers']}, norm_stats has {len(layers)}")
    sites = {f"{kind}.{layer}": metadata["d_model"] for layer in layers for kind in ("mlp_in", "mlp_out")}
    dtype = str(metadata.get("dtype")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UserError(f"{path}: info: dtype is {dtype}; allowed: {', '.join(_DTYPES)}")
    chunks = foreign.parse_index(raw, metadata["total_tokens"], f"{path}: manifest")
    return Manifest(
        format_version=0,
        sites=sites,
        dtype=dtype,
        chunks=tuple(_record(index, rows, sites) for index, rows in chunks),
        tokens=metadata["total_tokens"],
        model=str(metadata.get("model_name", "unknown")),
        fingerprint=None,
        identity={},
    )


def _record(index: int, rows: int, sites: dict[str, int]) -> ChunkRecord:
    name, nowhere = f"chunk_{index}.hdf5", dict.fromkeys(sites)  # how the file is laid out is the server's affair
    return ChunkRecord(index=index, file=name, rows=rows, bytes=0, checksum=None, offsets=nowhere)


def read_statistics(path: str, manifest: Manifest) -> dict[str, SiteStatistics]:
    """Statistics of every site by norm_stats. Raises UserError where one is missing or of another width."""
    return foreign.parse_statistics(_statistics(path), manifest, f"{path}: norm_stats")


def _statistics(path: str) -> dict[str, Any]:
    fs, dataset = _served(path)
    try:
        found = _object(fs, dataset, "norm_stats")
    except FileNotFoundError:
        raise UserError(f"{path}: norm_stats: missing") from None
    if not (found and all(layer.isdecimal() for layer in found)):
        raise UserError(f"{path}: norm_stats: expected an object with a key a layer")
    return found


def _object(fs: ServedFileSystem, dataset: str, route: str) -> dict[str, Any]:
    url = f"{fs.route(dataset)}/{route}"
    try:
        found = json.loads(fs.web.ask("GET", url))
    except ValueError as error:
        raise UserError(f"{fs.web.base}{url}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{fs.web.base}{url}: expected a JSON object")
    return found


def _served(path: str) -> tuple[ServedFileSystem, str]:
    fs, dataset = files.filesystem(path)
    assert isinstance(fs, ServedFileSystem), f"{path} is on a server"
    return fs, dataset
