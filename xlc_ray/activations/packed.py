"""Rows of int8 (compact.py) that stay packed until they are on the device that trains on them: a quarter of float32's
bytes travel.

A row's numbers are centre_c + scale_c q by the chunk it comes from, then its outliers are written over them. Both ways
to float32, in the reader (`PackedRows.unpack`) and on the device (`Unpacker`), are one function, and so equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256  # rows that stay in a core's cache while they are unpacked
_LINE = 64  # arrays that are sent together begin at multiples of it


@dataclass(frozen=True)
class PackedRows:
    """Rows of several chunks, in the order of the stream."""

    values: Mapping[str, np.ndarray]
    """Of each site, int8 [n, d]."""
    chunk: np.ndarray
    """Which of the chunks in `scales` each row is of, int32 [n]."""
    scales: Mapping[str, np.ndarray]
    """Centre and scale of each site's channels in each chunk, float32 [2, chunks, d]."""
    outliers: Mapping[str, np.ndarray]
    """Row, channel and float32 bits of each, int32 [outliers, 3], by rows; rows count from 0 here."""

    def __len__(self) -> int:
        return len(self.chunk)

    def part(self, start: int, stop: int) -> PackedRows:
        """Rows start … stop-1, with the very `scales` of all."""
        outliers = {}
        for site, entries in self.outliers.items():
            first, last = np.searchsorted(entries[:, 0], (start, stop))
            outliers[site] = entries[first:last] - np.array([start, 0, 0], np.int32)
        values = {site: q[start:stop] for site, q in self.values.items()}
        return PackedRows(values, self.chunk[start:stop], self.scales, outliers)

    def unpack(self, out: Mapping[str, np.ndarray]) -> None:
        """The numbers of every site, into float32 [n, d], on this processor."""
        chunk = _tensor(self.chunk)
        for site, q in self.values.items():
            _unpack(
                _tensor(q), chunk, _tensor(self.scales[site]), _tensor(self.outliers[site]), torch.from_numpy(out[site])
            )


PackedBatch = tuple[PackedRows, ...]
"""The rows of a batch: a part of one block, or of a few."""


class Unpacker:
    """Unpacks consecutive batches on a device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._known: Mapping[str, np.ndarray] | None = None
        self._scales: dict[str, Tensor] = {}

    def __call__(self, batch: PackedBatch, out: Mapping[str, Tensor]) -> None:
        """The numbers of a batch, into {site: float32 [rows, d]} on the device."""
        start = 0
        for rows in batch:
            if rows.scales is not self._known:  # else they are there: scales of many chunks outweigh a batch's rows
                self._known = rows.scales
                self._scales = dict(zip(rows.scales, _sent(list(rows.scales.values()), self._device), strict=True))
            sites = list(out)
            sent = _sent([rows.chunk, *(a[site] for a in (rows.values, rows.outliers) for site in sites)], self._device)
            chunk, values, outliers = sent[0], sent[1 : 1 + len(sites)], sent[1 + len(sites) :]
            for site, q, entries in zip(sites, values, outliers, strict=True):
                _unpack(q, chunk, self._scales[site], entries, out[site][start : start + len(rows)])
            start += len(rows)


def _unpack(values: Tensor, chunk: Tensor, scales: Tensor, outliers: Tensor, out: Tensor) -> None:
    """int8 [n, d] → float32 `out` [n, d], by operations that round alike on every device: no fused multiply and add."""
    centre, scale = scales
    step = _BLOCK if out.device.type == "cpu" else max(1, len(out))
    for start in range(0, len(out), step):
        block = slice(start, start + step)
        which = chunk[block]
        out[block].copy_(values[block]).mul_(scale.index_select(0, which)).add_(centre.index_select(0, which))
    row, channel, bits = outliers.unbind(1)
    out[row, channel] = bits.view(torch.float32)


def _sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays on a device, by one copy for all, from pinned memory to a GPU."""
    ends = list(accumulate((-(-array.nbytes // _LINE) * _LINE for array in arrays), initial=0))
    together = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = together.numpy()
    for array, at in zip(arrays, ends[:-1], strict=True):
        room[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = together.to(device, non_blocking=True)
    return [
        there[at : at + array.nbytes].view(_tensor(array[:0]).dtype).view(array.shape)
        for array, at in zip(arrays, ends[:-1], strict=True)
    ]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
