"""The activation store: a directory or URL of chunk files, opened for reading. (Writing: writing.py, named here too.)

Local files are read by offsets (reading.py), compressed ones by h5py slices, URLs by byte ranges
(ranges.py), servers of ours and of crosslayer-coding by slices of rows (http.py). Arrays keep the stored type (bfloat16
as uint16 bits) until `decode`. As soon as they are read bfloat16_zstd (lossless.py) is bfloat16 and int8 (compact.py)
float32, or rows that are still to be unpacked (packed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
from pydantic import ValidationError

from xlc_ray import files
from xlc_ray.activations import chunkfile, compact, foreign, http, lossless, ranges, reading
from xlc_ray.activations.cache import DiskCache
from xlc_ray.activations.chunkfile import decode, encode, stored_dtype, torch_dtype
from xlc_ray.activations.manifest import FORMAT_VERSION, MEND, ChunkRecord, Manifest, SiteStatistics, Span
from xlc_ray.activations.packed import PackedRows
from xlc_ray.activations.windows import ChunkText
from xlc_ray.activations.writing import (
    begin,
    compare,
    fingerprint,
    finish,
    identity,
    missing_chunks,
    names,
    read_plan,
    read_text,
    remove_text,
    write_chunk,
    write_plan,
    write_text,
)
from xlc_ray.config import UserError
from xlc_ray.config.sources import HttpSource, LiveSource, Source, StoreSource
from xlc_ray.web import SCHEMES

VERIFIED_AT_ONCE = 4096
"""Rows, of a chunk whose file is not ours to read."""

__all__ = [
    "Arrays",
    "ChunkRecord",
    "Manifest",
    "SiteStatistics",
    "Store",
    "begin",
    "check_model",
    "compare",
    "decode",
    "encode",
    "fingerprint",
    "finish",
    "fresh",
    "identity",
    "is_there",
    "missing_chunks",
    "names",
    "open_source",
    "open_store",
    "read_plan",
    "read_text",
    "remove_text",
    "stored_dtype",
    "torch_dtype",
    "write_chunk",
    "write_plan",
    "write_text",
]


Arrays = Callable[[Mapping[str, int], int, np.dtype], dict[str, np.ndarray]]
"""{site: width}, rows, dtype → {site: array [rows, width]}, with anything in them."""


def fresh(widths: Mapping[str, int], rows: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """New arrays."""
    return {site: np.empty((rows, width), dtype) for site, width in widths.items()}


def open_store(path: str, cache: DiskCache | None = None) -> Store:
    """Open a complete store, ours or crosslayer-coding's. Raises UserError where there is none or it disagrees."""
    name = files.join(path, "manifest.json")
    served = path.startswith(SCHEMES)
    if files.exists(name):
        raw = files.read_mapping(name)
        if raw.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise UserError(
                f"{name}: format_version {raw['format_version']} is newer than {FORMAT_VERSION}; update xlc_ray"
            )
        try:
            manifest = Manifest.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    elif served and (found := http.read_manifest(path)):
        manifest = found
    elif not served and files.exists(files.join(path, "index.bin")):
        manifest = foreign.read_manifest(path)
    elif files.exists(files.join(path, "identity.json")):
        raise UserError(f"{path}: these activations are not complete; generate again to make the rest")
    else:
        raise UserError(f"{path}: no activations here (neither manifest.json nor index.bin)")
    store = Store(path, manifest, cache)
    store.statistics()  # a store without them must not get as far as training
    return store


def is_there(path: str) -> bool:
    """Whether a path holds a complete store, ours or crosslayer-coding's."""
    if path.startswith(SCHEMES):
        return files.exists(files.join(path, "manifest.json")) or http.read_manifest(path) is not None
    return any(files.exists(files.join(path, name)) for name in ("manifest.json", "index.bin"))


def check_model(data: Store, name: str) -> None:
    """Raises UserError where a store that we wrote is of another language model: stores know it by its last name."""
    if data.manifest.fingerprint is not None and files.name(data.manifest.model) != files.name(name):
        raise UserError(f"model.name: {name}; the activations in {data.path} are of {data.manifest.model}")


def open_source(source: Source, *inside: str) -> Store:
    """Open the store that settings name, or one inside it ("held_out"). Raises UserError as `open_store`."""
    cache = None
    match source:
        case LiveSource(path=path, sample_tokens=tokens) if not inside:
            from xlc_ray.activations.live import open_live  # whose store is one of these

            return open_live(path, tokens)
        case StoreSource(cache=settings) if settings is not None:
            cache = DiskCache(settings.path, settings.max_bytes)
        case StoreSource() | HttpSource() | LiveSource():
            pass
    return open_store(files.join(source.path, *inside), cache)


@dataclass(frozen=True)
class Store:
    """Plain data, cheap to send to another process: open files are kept by reading.py, not here.

    A chunk is named by its place in `manifest.chunks`.
    """

    path: str
    manifest: Manifest
    cache: DiskCache | None = None
    """Where blocks of a URL's chunks are kept on a local disk."""
    patience: float = 0.0
    """Seconds for which a local file system that fails is asked again."""

    @property
    def chunk_rows(self) -> list[int]:
        """Rows of each chunk."""
        return [chunk.rows for chunk in self.manifest.chunks]

    @property
    def kept_rows(self) -> list[int]:
        """Rows of each chunk, from the first on, that can be read before training."""
        return self.chunk_rows

    @property
    def dtype(self) -> str:
        """float32, float16, bfloat16, bfloat16_zstd or int8."""
        return self.manifest.dtype

    def read(self, chunk: int, start: int, stop: int, sites: Sequence[str]) -> dict[str, np.ndarray]:
        """Rows start … stop-1 of a chunk: {site: [stop - start, width]}."""
        return self.gather(np.full(stop - start, chunk), np.arange(start, stop), sites)

    def gather(
        self,
        chunk: np.ndarray,
        row: np.ndarray,
        sites: Sequence[str],
        arrays: Arrays = fresh,
    ) -> dict[str, np.ndarray]:
        """Any rows, in any order: chunk [n], row [n] → {site: [n, width]}, in arrays that `arrays` gives. Raises
        UserError naming a damaged file."""
        self._check(chunk, row, sites)
        out = arrays({site: self.manifest.sites[site] for site in sites}, len(row), stored_dtype(self.dtype))
        if self.dtype == "int8":
            self.packed(chunk, row, sites).unpack(out)
        else:
            self._fill(chunk, row, out)
        return out

    def packed(self, chunk: np.ndarray, row: np.ndarray, sites: Sequence[str]) -> PackedRows:
        """The same rows of a store of int8, not yet unpacked. Raises UserError as `gather`."""
        self._check(chunk, row, sites)
        values = fresh({site: self.manifest.sites[site] for site in sites}, len(row), chunkfile.on_disk("int8"))
        self._fill(chunk, row, values)
        return compact.packed_rows(self.bytes_of, self.manifest, chunk, row, values)

    def _check(self, chunk: np.ndarray, row: np.ndarray, sites: Sequence[str]) -> None:
        for site in sites:
            if site not in self.manifest.sites:
                raise UserError(f"{self.path}: has no site {site}; allowed: {', '.join(self.manifest.sites)}")
        assert not len(row) or (row.min() >= 0 and (row < np.array(self.chunk_rows)[chunk]).all()), "rows exist"

    def _fill(self, chunk: np.ndarray, row: np.ndarray, out: dict[str, np.ndarray]) -> None:
        """Copy rows as they are stored into each site's array of `out`."""
        to = np.lexsort((row, chunk))
        chunk, row = chunk[to], row[to]
        if self.dtype == lossless.DTYPE:
            lossless.fill(self.bytes_of, self.path, self.manifest, chunk, row, to, out)
            return
        if self.path.startswith(SCHEMES) and self.dtype != "int8":  # which slices of crosslayer-coding do not know
            http.fill(self.path, self.manifest, chunk, row, to, out)
            return
        if files.is_url(self.path):
            ranges.fill(self.path, self.manifest, chunk, row, to, out, self.cache)
            return
        for part in np.split(np.arange(len(row)), np.flatnonzero(np.diff(chunk)) + 1):
            if len(part):
                record = self.manifest.chunks[chunk[part[0]]]
                path = files.join(files.local(self.path), record.file)
                reading.scatter(path, record, self.manifest.sites, self.dtype, row[part], to[part], out, self.patience)

    def bytes_of(self, spans: Sequence[Span]) -> Iterator[np.ndarray | bytes]:
        """The bytes of each span of chunk files, in order. Raises UserError naming a damaged file."""
        if files.is_url(self.path):
            yield from ranges.read(self.path, spans, self.cache)
            return
        for span in spans:
            yield reading.span(files.join(files.local(self.path), span.record.file), span, self.patience)

    def windows(self, chunk: int) -> ChunkText | None:
        """The token windows of a chunk and the (window, position) of each of its rows; None in stores without text."""
        if not self.manifest.has_text:
            return None
        return read_text(self.path, self.manifest.chunks[chunk].index)

    def statistics(self) -> dict[str, SiteStatistics]:
        """Mean, unbiased deviation and mean norm of every site. Raises UserError where they are missing."""
        if self.manifest.fingerprint is None:
            read = http.read_statistics if self.path.startswith(SCHEMES) else foreign.read_statistics
            return read(self.path, self.manifest)
        name = files.join(self.path, "statistics.json")
        tree, found = files.read_mapping(name), {}
        for site, width in self.manifest.sites.items():
            s = tree.get(site)
            if s is None or len(s["mean"]) != width or len(s["std"]) != width or s["count"] != self.manifest.tokens:
                raise UserError(f"{name}: {site} is missing or not of this store")
            found[site] = SiteStatistics(s["count"], np.array(s["mean"]), np.array(s["std"]), s["mean_norm"])
        return found

    def verify(self) -> None:
        """Read every chunk whole. Raises UserError naming the first that is missing, cut, altered or misshapen."""
        for chunk in range(len(self.manifest.chunks)):
            self.verify_chunk(chunk)

    def verify_chunk(self, chunk: int) -> None:
        """One chunk's share of `verify`."""
        record = self.manifest.chunks[chunk]
        path = files.join(self.path, record.file)
        if self.manifest.fingerprint is None and self.path.startswith(SCHEMES):
            for start in range(0, record.rows, VERIFIED_AT_ONCE):  # its files are the server's own
                self.read(chunk, start, min(start + VERIFIED_AT_ONCE, record.rows), list(self.manifest.sites))
            return
        size = files.size(path)
        if size is None:
            raise UserError(f"{path}: the chunk is missing")
        if size != record.bytes:
            raise UserError(f"{path}: cut or altered: {size} bytes where the manifest says {record.bytes}")
        if record.checksum is None:
            self._verify_unsigned(files.local(path), record)
        elif chunkfile.checksum(path) != record.checksum:
            raise UserError(f"{path}: altered: its checksum is not the manifest's; {MEND}")

    def _verify_unsigned(self, path: str, record: ChunkRecord) -> None:
        with chunkfile.open_hdf5(path) as file:
            for site, width in self.manifest.sites.items():
                dataset = chunkfile.check_dataset(file, path, site, (record.rows, width), self.dtype)
                _read_through(dataset, path)


def _read_through(dataset: h5py.Dataset, path: str) -> None:
    step = dataset.chunks[0] if dataset.chunks else 16384
    try:
        for start in range(0, dataset.shape[0], step):
            dataset[start : start + step]
    except OSError as error:
        raise UserError(f"{path}: {dataset.name} cannot be read: {str(error).splitlines()[0]}") from None
