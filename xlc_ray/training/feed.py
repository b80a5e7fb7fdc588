"""One batch for all ranks of a replica, on their device: the leader reads, the others receive. The only place that
knows it.

On the CPUs of one machine the ranks look at the same memory (rooms.py); else the leader broadcasts. On a GPU a batch
leaves pinned memory, in the dtype of the store, on a stream of its own while the step before it runs. Rows of int8 go
to a GPU packed, and are float32 from there on (packed.py); on CPUs readers, which run beside the ranks, unpack them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xlc_ray.activations.packed import PackedBatch, Unpacker
from xlc_ray.activations.source import Memory
from xlc_ray.activations.store import torch_dtype
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards, Wiring
from xlc_ray.training.rooms import LINE, Rooms

Batches = Iterator[Mapping[str, Tensor]]
Read = Iterator[Mapping[str, Tensor] | PackedBatch]
Reader = Callable[[Wiring, int, Memory], Read]
"""(wiring, first step, memory) → this replica's share of each global batch from that step to the
last. Packed or not is for each reader to choose: `goes_packed` says what is best."""


Feed = Callable[[Wiring, int], Batches]
"""Likewise, for every rank, on its device."""


def goes_packed(dtype: str, device: torch.device) -> bool:
    """Whether batches of a store are unpacked on the device."""
    return dtype == "int8" and device.type == "cuda"


def for_all_ranks(config: Config, dtype: str, reader: Reader, shards: Shards, device: torch.device) -> Feed:
    """The same batches on the device of every rank of a replica, of which only the leader calls `reader`."""

    def read(wiring: Wiring, first: int) -> Batches:
        shape = Shape.of(config, wiring, config.train.batch_tokens // shards.replicas, dtype)
        return shared(lambda memory: reader(wiring, first, memory), config.train.steps - first, shape, shards, device)

    return read


@dataclass(frozen=True)
class Shape:
    """Of a batch: {site: width}, rows, and the dtype of a store; and the most rows that are read together."""

    widths: Mapping[str, int]
    rows: int
    dtype: torch.dtype
    window_rows: int

    @staticmethod
    def of(config: Config, wiring: Wiring, rows: int, dtype: str) -> Shape:
        """The batches of a run."""
        widths = {site: wiring.widths[site] for site in wiring.sites}
        return Shape(widths, rows, torch_dtype(dtype), config.source.slice_rows * config.source.window_slices)

    @property
    def numbers(self) -> int:
        """Of a batch, over all sites."""
        return self.rows * sum(self.widths.values())

    def by_site(self, buffer: Tensor) -> dict[str, Tensor]:
        """A batch that lies in one buffer, a site after another: views of it."""
        parts = buffer.split([self.rows * width for width in self.widths.values()])
        return {site: part.view(self.rows, -1) for site, part in zip(self.widths, parts, strict=True)}

    def rooms(self) -> tuple[int, int]:
        """Bytes of a window and of a batch."""
        row = sum(self.widths.values()) * self.dtype.itemsize
        lines = LINE * len(self.widths)
        return self.window_rows * row + lines, self.rows * row + lines


def shared(read: Callable[[Memory], Read], count: int, shape: Shape, shards: Shards, device: torch.device) -> Batches:
    """`count` batches (site → [rows, width], on `device`), equal on all ranks of a replica.

    `read` is called on the leader only. Batches have the store's `dtype` from the disk to the encoder, and stay as they
    are until the next one is asked for. The number of batches is known to all, so no stop flag travels.
    """
    alone, on_cpu, sizes = shards.group is None, device.type == "cpu", shape.rooms()
    rooms = Rooms.of_replica(*sizes, shards) if on_cpu and not alone else Rooms.own(*sizes)
    batches = _led(read, rooms) if alone or shards.rank == 0 else None
    if on_cpu and alone:
        assert batches is not None, "one rank leads"
        yield from _unpacked(batches, shape)
    elif rooms.shared:
        numbers = None if batches is None else _unpacked(batches, shape)
        for _ in range(count):
            yield _looked_at(rooms, numbers, shape, shards)
    else:
        yield from _sent(batches, count, shape, shards, device)


def _led(read: Callable[[Memory], Read], rooms: Rooms) -> Read:
    for batch in read(Memory(rooms.window, rooms.batch)):
        rooms.hand_out(batch if isinstance(batch, Mapping) else {})  # packed rows lie in no room
        yield batch


def _unpacked(batches: Read, shape: Shape) -> Batches:
    """On the CPU."""
    unpack = Unpacker(torch.device("cpu"))
    for batch in batches:
        if isinstance(batch, Mapping):
            yield batch
        else:
            numbers = shape.by_site(torch.empty(shape.numbers, dtype=shape.dtype))
            unpack(batch, numbers)
            yield numbers


def _looked_at(rooms: Rooms, batches: Batches | None, shape: Shape, shards: Shards) -> Mapping[str, Tensor]:
    """The next batch, where the leader has it."""
    where = torch.zeros(len(shape.widths), dtype=torch.int64)
    if batches is not None:
        batch = next(batches)
        where = torch.tensor(rooms.places({site: batch[site] for site in shape.widths}))
    dist.all_reduce(where, group=shards.group)  # and not a broadcast, which the leader would not wait for
    places = zip(shape.widths.items(), where.tolist(), strict=True)
    return {site: rooms.at(place, (shape.rows, width), shape.dtype) for (site, width), place in places}


def _sent(batches: Read | None, count: int, shape: Shape, shards: Shards, device: torch.device) -> Batches:
    """Each batch in memory of its own, the one after it on its way to a GPU."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    unpack, ahead = Unpacker(device), None
    for i in range(count):
        now = _next(batches, unpack, shape, shards, device, side) if ahead is None else ahead
        ahead = None
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)
            now.record_stream(torch.cuda.current_stream(device))
            if i + 1 < count:
                ahead = _next(batches, unpack, shape, shards, device, side)
        yield shape.by_site(now)


def _next(
    batches: Read | None,
    unpack: Unpacker,
    shape: Shape,
    shards: Shards,
    device: torch.device,
    side: torch.cuda.Stream | None,
) -> Tensor:
    """The next batch, one site after another, on the device; copied, unpacked and sent on the stream `side`."""
    batch = None if batches is None else next(batches)
    with torch.cuda.stream(side):
        if isinstance(batch, Mapping):
            host = torch.empty(shape.numbers, dtype=shape.dtype, pin_memory=side is not None)
            torch.cat([batch[site].reshape(-1) for site in shape.widths], out=host)
            # torch hands out pinned memory that was given back only when copies from it have ended.
            buffer = host.to(device, non_blocking=True)
        else:
            buffer = torch.empty(shape.numbers, dtype=shape.dtype, device=device)
            if batch is not None:
                unpack(batch, shape.by_site(buffer))
        if shards.group is not None:
            source = dist.get_global_rank(shards.group, 0)
            dist.broadcast(buffer.view(torch.uint8), src=source, group=shards.group)
        return buffer
