"""The rows and windows that an evaluation reads, and which of them each worker takes.

Batches are cut before they are shared out, and a worker takes a run of whole ones: each is what it is in one process,
so that sums over workers differ from those of one process by the order of addition alone, and counts not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlc_ray.activations.store import Store, decode
from xlc_ray.evaluation.replacement import Batch, prepare

Slice = tuple[int, int, int]
"""Chunk, first, and one past the last row or window within it."""


@dataclass(frozen=True)
class Share:
    """One worker's part of a list of batches: the `number`th of `of` runs, as equal as whole batches allow."""

    number: int
    of: int

    def take(self, batches: Sequence[Slice]) -> Sequence[Slice]:
        """Empty where there are fewer batches than workers and others have them."""
        first, stop = (len(batches) * n // self.of for n in (self.number, self.number + 1))
        return batches[first:stop]


WHOLE = Share(0, 1)


def held_out_batches(
    store: Store, sites: Iterable[str], batch_rows: int, most: int, share: Share = WHOLE
) -> Iterator[dict[str, Tensor]]:
    """A share of the first `most` rows of a store, in its order, as {site: [at most batch_rows, width]} float32."""
    sites = tuple(sites)
    for chunk, start, stop in share.take(_slices(store.chunk_rows, batch_rows, most)):
        found = store.read(chunk, start, stop, sites)
        yield {site: decode(values, store.manifest.dtype) for site, values in found.items()}


def held_out_windows(
    store: Store, batch_windows: int, most: int, device: str | torch.device, share: Share = WHOLE
) -> Iterator[Batch]:
    """A share of the first `most` windows of text behind a store, at most `batch_windows` at a time.

    Kept are exactly the positions that the store holds as rows.
    """
    held: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None
    for chunk, start, stop in share.take(_slices(_windows_of_chunks(store, most), batch_windows, most)):
        if held is None or held[0] != chunk:
            held = chunk, _read(store, chunk)
        tokens, length, keep = held[1]
        yield prepare(tokens[start:stop], length[start:stop], keep[start:stop], device)


def _slices(sizes: Iterable[int], batch: int, most: int) -> list[Slice]:
    """The first `most` of all, cut within each chunk into batches; none dropped."""
    found, left = [], most
    for chunk, size in enumerate(sizes):
        here = min(size, left)
        found += [(chunk, start, min(start + batch, here)) for start in range(0, here, batch)]
        left -= here
    return found


def _windows_of_chunks(store: Store, most: int) -> list[int]:
    """Windows of as many of the first chunks as hold `most`: no manifest counts them."""
    sizes: list[int] = []
    while len(sizes) < len(store.chunk_rows) and sum(sizes) < most:
        sizes.append(len(_read(store, len(sizes))[0]))
    return sizes


def _read(store: Store, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [n, context], length [n], keep [n, context] of a chunk's windows."""
    text = store.windows(chunk)
    assert text is not None, "a store without text has been refused"
    keep = torch.zeros(text.windows.tokens.shape, dtype=torch.bool)
    keep[torch.from_numpy(text.row_window).long(), torch.from_numpy(text.row_position).long()] = True
    return torch.from_numpy(text.windows.tokens), torch.from_numpy(text.windows.length), keep
