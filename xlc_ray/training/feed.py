"""One batch for all ranks of a replica: the leader reads, the others receive. The only function that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from xlc_ray.dictionary import Shards


def shared(
    read: Callable[[], Iterator[Mapping[str, Tensor]]],
    count: int,
    widths: Mapping[str, int],
    rows: int,
    dtype: torch.dtype,
    shards: Shards,
) -> Iterator[Mapping[str, Tensor]]:
    """`count` batches (site → [rows, width]), equal on all ranks of a replica.

    `read` is called on the leader only. `dtype` is the store's: what was stored in it loses nothing on the way. The
    number of batches is known to all, so no stop flag travels.
    """
    if shards.group is None:
        yield from read()
        return
    source = dist.get_global_rank(shards.group, 0)
    batches = read() if shards.rank == 0 else None
    buffer = torch.empty(rows, sum(widths.values()), dtype=dtype)
    for _ in range(count):
        if batches is not None:
            batch = next(batches)
            torch.cat([batch[s].to(dtype) for s in widths], dim=1, out=buffer)
        dist.broadcast(buffer.view(torch.uint8), src=source, group=shards.group)
        parts = buffer.float().split(list(widths.values()), dim=1)
        yield dict(zip(widths, parts, strict=True))
