"""Eight bits a number: x̂ = centre_c + scale_c q with q in -127 … 127, for each channel c of a chunk.

Centre and scale span the shortest interval that holds all but a thousandth of the channel's rows. What lies outside is
an outlier and kept as it is, in float32, so that a few of them do not coarsen the rest; they add about a hundredth to
the bytes. What is lost of the variance, Σ‖x − x̂‖² / Σ‖x̂ − mean‖², is measured as a chunk is written.

Beside its int8 rows a site has in the chunk file

    centre f32 [d]   scale f32 [d]   starts i32 [⌈rows / 64⌉ + 1]   outliers (row i32, channel i32, value f32) by rows

where starts[b] is the first outlier of rows 64 b and after, so that a slice of rows needs a slice of the outliers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from xlc_ray.activations.manifest import ChunkRecord, Manifest, Read, Span
from xlc_ray.activations.packed import PackedRows

LARGEST = 127
_RARE = 1000  # one row in so many may be an outlier of a channel
_ROWS = 64
_ENTRY = np.dtype([("row", "<i4"), ("channel", "<i4"), ("value", "<f4")])


@dataclass(frozen=True)
class Packed:
    """The rows of one site in a chunk."""

    values: np.ndarray
    """int8 [rows, d]."""
    side: np.ndarray
    """What else it takes to unpack them, uint8 [bytes]."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.values)


def pack(values: np.ndarray) -> Packed:
    """Pack finite float32 rows [rows, d]."""
    x = torch.from_numpy(values)
    rows = len(x)
    centre, scale = _interval(x)
    q = (x - centre).div_(scale).round_()
    at = ((q > LARGEST) | (q < -LARGEST)).nonzero(as_tuple=True)
    entries = np.zeros(len(at[0]), _ENTRY)
    entries["row"], entries["channel"] = (index.numpy() for index in at)
    entries["value"] = x[at].numpy()
    starts = np.searchsorted(entries["row"], np.arange(0, rows + _ROWS, _ROWS)).astype("<i4")
    head = [centre.numpy().astype("<f4"), scale.numpy().astype("<f4"), starts, entries]
    side = np.concatenate([part.view(np.uint8).reshape(-1) for part in head])
    return Packed(q.clamp_(-LARGEST, LARGEST).to(torch.int8).numpy(), side)


def _interval(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and scale of each channel of [rows, d]. One that does not vary has a scale below any difference."""
    out = min(-(-len(x) // _RARE), len(x) - 1)
    least = x.topk(out + 1, dim=0, largest=False).values
    most = x.topk(out + 1, dim=0).values.flip(0)
    best = (most - least).argmin(dim=0, keepdim=True)
    low, high = (ends.gather(0, best).squeeze(0) for ends in (least, most))
    return (low + high) / 2, ((high - low) / (2 * LARGEST)).clamp(min=torch.finfo(torch.float32).tiny)


def unpack(packed: Packed) -> np.ndarray:
    """All rows of a site, float32 [rows, d]."""
    rows, d = packed.values.shape
    out, end = np.empty((rows, d), np.float32), _head_bytes(rows, d)
    head = _Head.of(packed.side[:end], d)
    outliers = _of_rows(packed.side[end:].view(_ENTRY), np.arange(rows), np.arange(rows))
    whole = PackedRows({"": packed.values}, np.zeros(rows, np.int32), {"": head.scales[:, None]}, {"": outliers})
    whole.unpack({"": out})
    return out


def packed_rows(
    read: Read, manifest: Manifest, chunk: np.ndarray, row: np.ndarray, values: Mapping[str, np.ndarray]
) -> PackedRows:
    """Any rows, chunk [n] and row [n], of which `values` {site: int8 [n, d]} are there: with all else that it takes to
    unpack them, by two rounds of `read`."""
    parts = _by_chunk(chunk, row)
    asked = [(site, part, manifest.chunks[chunk[part[0]]]) for part in parts for site in values]
    heads = [
        _Head.of(np.frombuffer(raw, np.uint8), manifest.sites[site])
        for (site, _, _), raw in zip(
            asked, read([_head_span(manifest, site, record) for site, _, record in asked]), strict=True
        )
    ]
    wanted = [
        list(_outlier_spans(manifest, head, row[part], site, record))
        for head, (site, part, record) in zip(heads, asked, strict=True)
    ]
    found = iter(read([span for spans in wanted for span in spans]))
    which = np.zeros(len(row), np.int32)
    for number, part in enumerate(parts):
        which[part] = number
    scales = {site: np.empty((2, len(parts), q.shape[1]), np.float32) for site, q in values.items()}
    outliers = {site: [np.empty((0, 3), np.int32)] for site in values}
    for (site, part, _), head, spans in zip(asked, heads, wanted, strict=True):
        scales[site][:, which[part[0]]] = head.scales
        blobs = [np.frombuffer(next(found), _ENTRY) for _ in spans]
        if blobs:
            outliers[site].append(_of_rows(np.concatenate(blobs), row[part], part))
    return PackedRows(values, which, scales, {site: _by_rows(entries) for site, entries in outliers.items()})


def _by_chunk(chunk: np.ndarray, row: np.ndarray) -> list[np.ndarray]:
    """For each chunk that rows are of, which of them: indices of chunk [n] and row [n], by ascending rows."""
    order = np.lexsort((row, chunk))
    return [part for part in np.split(order, np.flatnonzero(np.diff(chunk[order])) + 1) if len(part)]


@dataclass(frozen=True)
class _Head:
    scales: np.ndarray
    """Centre and scale, float32 [2, d]."""
    starts: np.ndarray

    @staticmethod
    def of(raw: np.ndarray, d: int) -> _Head:
        return _Head(raw[: 8 * d].view("<f4").reshape(2, d), raw[8 * d :].view("<i4"))


def _of_rows(entries: np.ndarray, row: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The outliers of rows `row` (ascending, perhaps repeated) of a chunk among `entries`, as [outliers, 3], where they
    are of rows `to`."""
    first, last = (np.searchsorted(entries["row"], row, side) for side in ("left", "right"))
    count = last - first
    which = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    found = entries[which].view("<i4").reshape(-1, 3)
    found[:, 0] = np.repeat(to, count)
    return found


def _by_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    entries = np.concatenate(parts)
    return entries[np.argsort(entries[:, 0], kind="stable")]


def _head_bytes(rows: int, d: int) -> int:
    return 8 * d + 4 * (-(-rows // _ROWS) + 1)


def _head_span(manifest: Manifest, site: str, record: ChunkRecord) -> Span:
    start = record.sides[site]
    return Span(record, start, start + _head_bytes(record.rows, manifest.sites[site]))


def _outlier_spans(manifest: Manifest, head: _Head, row: np.ndarray, site: str, record: ChunkRecord) -> Iterator[Span]:
    """Where the outliers of these rows are: neighbouring blocks of rows in one span, no span without an outlier."""
    base = record.sides[site] + _head_bytes(record.rows, manifest.sites[site])
    blocks = np.unique(row // _ROWS)
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1):
        start, stop = int(head.starts[run[0]]), int(head.starts[run[-1] + 1])
        if stop > start:
            yield Span(record, base + start * _ENTRY.itemsize, base + stop * _ENTRY.itemsize)
