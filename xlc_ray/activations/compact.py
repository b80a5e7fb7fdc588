"""Eight bits a number: x̂ = centre_c + scale_c q with q in -127 … 127, for each channel c of a chunk.

Centre and scale span the shortest interval that holds all but a thousandth of the channel's rows. What lies outside is
an outlier and kept as it is, in float32, so that a few of them do not coarsen the rest; they add about a hundredth to
the bytes. What is lost of the variance, Σ‖x − x̂‖² / Σ‖x̂ − mean‖², is measured as a chunk is written.

Beside its int8 rows a site has in the chunk file

    centre f32 [d]   scale f32 [d]   starts i32 [⌈rows / 64⌉ + 1]   outliers (row i32, channel i32, value f32) by rows

where starts[b] is the first outlier of rows 64 b and after, so that a slice of rows needs a slice of the outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from xlc_ray.activations.manifest import ChunkRecord, Manifest, Span

LARGEST = 127
_RARE = 1000  # one row in so many may be an outlier of a channel
_ROWS = 64
_BLOCK = 256  # rows that stay in a core's cache while they are unpacked
_ENTRY = np.dtype([("row", "<i4"), ("channel", "<i4"), ("value", "<f4")])

Read = Callable[[Sequence[Span]], Iterable[np.ndarray | bytes]]
"""The bytes of each span."""


@dataclass(frozen=True)
class Packed:
    """The rows of one site in a chunk."""

    values: np.ndarray
    """int8 [rows, d]."""
    side: np.ndarray
    """What else it takes to unpack them, uint8 [bytes]."""

    @property
    def rows(self) -> int:
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
    out = np.empty((rows, d), np.float32)
    head = _Head.of(packed.side[: _head_bytes(rows, d)], d)
    head.unpack(packed.values, np.arange(rows), packed.side[_head_bytes(rows, d) :].view(_ENTRY), out)
    return out


def unpack_rows(
    read: Read, manifest: Manifest, chunk: np.ndarray, row: np.ndarray, packed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows sorted by chunk [n] and row [n], {site: int8 [n, d]} → {site: float32 [n, d]}, by two rounds of `read`."""
    out = {site: np.empty(values.shape, np.float32) for site, values in packed.items()}
    ends = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
    parts = [slice(start, stop) for start, stop in pairwise(ends) if stop > start]
    asked = [(site, part, manifest.chunks[chunk[part.start]]) for part in parts for site in packed]
    heads = [
        _Head.of(np.frombuffer(raw, np.uint8), manifest.sites[site])
        for (site, _, _), raw in zip(asked, read([_head_span(manifest, *one) for one in asked]), strict=True)
    ]
    wanted = [list(_outlier_spans(manifest, head, row[one[1]], *one)) for head, one in zip(heads, asked, strict=True)]
    found = iter(read([span for spans in wanted for span in spans]))
    for (site, part, _), head, spans in zip(asked, heads, wanted, strict=True):
        blobs = [np.frombuffer(next(found), _ENTRY) for _ in spans]
        entries = np.concatenate(blobs) if blobs else np.empty(0, _ENTRY)
        head.unpack(packed[site][part], row[part], entries, out[site][part])
    return out


@dataclass(frozen=True)
class _Head:
    centre: np.ndarray
    scale: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(raw: np.ndarray, d: int) -> _Head:
        return _Head(raw[: 4 * d].view("<f4"), raw[4 * d : 8 * d].view("<f4"), raw[8 * d :].view("<i4"))

    def unpack(self, values: np.ndarray, row: np.ndarray, entries: np.ndarray, out: np.ndarray) -> None:
        """Rows `row` [n] of the chunk, into float32 `out`; entries, ascending, hold all of their outliers."""
        packed, numbers, centre, scale = (
            torch.from_numpy(np.require(array, requirements=["W"])) for array in (values, out, self.centre, self.scale)
        )
        for start in range(0, len(row), _BLOCK):
            block = numbers[start : start + _BLOCK]
            block.copy_(packed[start : start + _BLOCK]).mul_(scale).add_(centre)
        first, last = (np.searchsorted(entries["row"], row, side) for side in ("left", "right"))
        count = last - first
        which = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        out[np.repeat(np.arange(len(row)), count), entries["channel"][which]] = entries["value"][which]


def _head_bytes(rows: int, d: int) -> int:
    return 8 * d + 4 * (-(-rows // _ROWS) + 1)


def _head_span(manifest: Manifest, site: str, part: slice, record: ChunkRecord) -> Span:
    start = record.sides[site]
    return Span(record, start, start + _head_bytes(record.rows, manifest.sites[site]))


def _outlier_spans(
    manifest: Manifest, head: _Head, row: np.ndarray, site: str, part: slice, record: ChunkRecord
) -> Iterator[Span]:
    """Where the outliers of these rows are: neighbouring blocks of rows in one span, no span without an outlier."""
    base = record.sides[site] + _head_bytes(record.rows, manifest.sites[site])
    blocks = np.unique(row // _ROWS)
    for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1):
        start, stop = int(head.starts[run[0]]), int(head.starts[run[-1] + 1])
        if stop > start:
            yield Span(record, base + start * _ENTRY.itemsize, base + stop * _ENTRY.itemsize)
