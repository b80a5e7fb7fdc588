"""One batch for all ranks of a replica, on their device: the leader reads, the others receive. The only place that
knows it.

On a GPU a batch leaves pinned memory, in the dtype of the store, on a stream of its own while the step before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from xlc_ray.activations.store import torch_dtype
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards, Wiring

Batches = Iterator[Mapping[str, Tensor]]
Reader = Callable[[Wiring, int], Batches]
"""(wiring, first step) → this replica's share of each global batch from that step to the last."""


def for_all_ranks(config: Config, dtype: str, reader: Reader, shards: Shards, device: torch.device) -> Reader:
    """The same batches on the device of every rank of a replica, of which only the leader calls `reader`."""

    def read(wiring: Wiring, first: int) -> Batches:
        widths = {site: wiring.widths[site] for site in wiring.sites}
        rows, count = config.train.batch_tokens // shards.replicas, config.train.steps - first
        return shared(lambda: reader(wiring, first), count, widths, rows, torch_dtype(dtype), shards, device)

    return read


def shared(
    read: Callable[[], Batches],
    count: int,
    widths: Mapping[str, int],
    rows: int,
    dtype: torch.dtype,
    shards: Shards,
    device: torch.device,
) -> Batches:
    """`count` batches (site → [rows, width], on `device`), equal on all ranks of a replica.

    `read` is called on the leader only. Batches have the store's `dtype` from the disk to the encoder. The number of
    batches is known to all, so no stop flag travels.
    """
    if shards.group is None and device.type == "cpu":
        yield from read()
        return
    leads = shards.group is None or shards.rank == 0
    batches = read() if leads else None
    source = None if shards.group is None else dist.get_global_rank(shards.group, 0)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: Tensor | None = None
    for i in range(count):
        now = _next(batches, widths, rows, dtype, shards, source, device, side) if ahead is None else ahead
        ahead = None
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)
            now.record_stream(torch.cuda.current_stream(device))
            if i + 1 < count:
                ahead = _next(batches, widths, rows, dtype, shards, source, device, side)
        parts = now.split(list(widths.values()), dim=1)
        yield dict(zip(widths, parts, strict=True))


def _next(
    batches: Batches | None,
    widths: Mapping[str, int],
    rows: int,
    dtype: torch.dtype,
    shards: Shards,
    source: int | None,
    device: torch.device,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """The next batch, its sites side by side, on the device; copied and sent on the stream `side`."""
    with torch.cuda.stream(side):
        if batches is None:
            buffer = torch.empty(rows, sum(widths.values()), dtype=dtype, device=device)
        else:
            batch = next(batches)
            buffer = torch.cat([batch[s] for s in widths], dim=1)
            if side is not None:
                buffer = buffer.pin_memory().to(device, non_blocking=True)
        if source is not None:
            dist.broadcast(buffer.view(torch.uint8), src=source, group=shards.group)
        return buffer
