"""Memory that a replica's batches lie in, used again and again: fresh gigabytes take as long to page in as to fill.

A reader gathers windows of rows straight into a *room*; a batch is a part of one, or is put together in a smaller room
where it straddles windows. On one machine all ranks of a replica look at the same rooms, so that a batch goes from the
disk to every rank without another copy. They meet once a batch, where the leader says at which bytes it lies; who has
come to batch n has no more use for n - 1. A room whose last batch was n - 2 or before is therefore free when the leader
makes batch n.

What is shared is a file without a name (memfd), which the others open by way of the leader's process: whatever happens
to the ranks, nothing is left behind, and the small /dev/shm of containers does not bound it. Pages that are never
touched take no memory.
"""

from __future__ import annotations

import itertools
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from xlc_ray.dictionary import Shards

_PAGE = mmap.PAGESIZE
_TOKEN = 16  # bytes by which ranks know that what they opened is the leader's
LINE = 64
"""Arrays begin at multiples of so many bytes."""


class Rooms:
    """Two rooms for windows and two for batches; `shared`: the same ones on every rank of the replica."""

    def __init__(self, memory: Tensor, window_bytes: int, batch_bytes: int, shared: bool = False):
        self.shared, self._memory = shared, memory
        self._start = self._memory.data_ptr()
        window, batch = _whole(window_bytes), _whole(batch_bytes)
        self._windows = [range(start, start + window) for start in (_PAGE, _PAGE + window)]
        self._batches = [range(start, start + batch) for start in (_PAGE + 2 * window, _PAGE + 2 * window + batch)]
        self._handed = -1
        self._last = dict.fromkeys(self._windows + self._batches, -2)
        """Room → the last batch that lies in it."""

    @staticmethod
    def own(window_bytes: int, batch_bytes: int) -> Rooms:
        """Rooms of this process alone."""
        memory = torch.from_numpy(np.empty(_size(window_bytes, batch_bytes), np.uint8))  # numpy asks for large pages
        return Rooms(memory, window_bytes, batch_bytes)

    @staticmethod
    def of_replica(window_bytes: int, batch_bytes: int, shards: Shards) -> Rooms:
        """Rooms that all ranks of a replica share, or, on all of them, rooms of their own, where one cannot open the
        leader's: on another machine, in another container, not on Linux. Called by every rank."""
        assert shards.group is not None, "one rank alone has its own"
        size = _size(window_bytes, batch_bytes)
        name, memory = torch.zeros(2 + _TOKEN, dtype=torch.int64), None
        if shards.rank == 0 and hasattr(os, "memfd_create"):
            file = os.memfd_create("xlc_batches")
            os.ftruncate(file, size)
            memory = mmap.mmap(file, size)
            memory[:_TOKEN] = secrets.token_bytes(_TOKEN)
            name = torch.tensor([os.getpid(), file, *memory[:_TOKEN]])
        dist.broadcast(name, src=dist.get_global_rank(shards.group, 0), group=shards.group)
        process, number, *token = name.tolist()
        if process and shards.rank != 0:
            memory = _opened(f"/proc/{process}/fd/{number}", size, bytes(token))
        all_see = torch.tensor([memory is not None], dtype=torch.int32)
        dist.all_reduce(all_see, op=dist.ReduceOp.MIN, group=shards.group)
        if process and shards.rank == 0:
            os.close(number)
        if memory is None or not all_see.item():
            return Rooms.own(window_bytes, batch_bytes)
        return Rooms(torch.frombuffer(memory, dtype=torch.uint8), window_bytes, batch_bytes, shared=True)

    def window(self, widths: Mapping[str, int], rows: int, dtype: np.dtype) -> dict[str, np.ndarray]:
        """Arrays [rows, width] in a free room; fresh ones where none is free, or they do not fit."""
        return self._arrays(self._windows, widths, rows, dtype)

    def batch(self, widths: Mapping[str, int], rows: int, dtype: np.dtype) -> dict[str, np.ndarray]:
        """Likewise, in a smaller room, for the batch that is handed out next."""
        return self._arrays(self._batches, widths, rows, dtype)

    def _arrays(
        self, rooms: Sequence[range], widths: Mapping[str, int], rows: int, dtype: np.dtype
    ) -> dict[str, np.ndarray]:
        sizes = {site: -(-rows * width * dtype.itemsize // LINE) * LINE for site, width in widths.items()}
        free = (room for room in rooms if self._last[room] < self._handed and sum(sizes.values()) <= len(room))
        if (room := next(free, None)) is None:
            return {site: np.empty((rows, width), dtype) for site, width in widths.items()}
        found, start = {}, room.start
        for site, width in widths.items():
            raw = self._memory[start : start + rows * width * dtype.itemsize].numpy()
            found[site] = raw.view(dtype).reshape(rows, width)
            start += sizes[site]
        return found

    def hand_out(self, batch: Mapping[str, Tensor]) -> None:
        """The leader's next batch goes to training: what it lies in is not free before the batch after the next."""
        self._handed += 1
        for values in itertools.islice(batch.values(), 1):  # all sites of a batch lie in one room, or none does
            place = self._place(values)
            self._last |= {room: self._handed for room in self._last if place in room}

    def places(self, batch: Mapping[str, Tensor]) -> list[int]:
        """At which byte each site of the batch that was handed out last lies, copied to a room where it was not."""
        found, start = [], 0
        for values in batch.values():
            place = self._place(values)
            if not (0 <= place < len(self._memory) and values.is_contiguous()):
                if not start:
                    room = next(room for room in self._batches if self._last[room] < self._handed - 1)
                    start, self._last[room] = room.start, self._handed
                place, start = start, start + values.nbytes
                self.at(place, values.shape, values.dtype).copy_(values)
            found.append(place)
        return found

    def at(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies at a byte."""
        count = int(np.prod(shape)) * dtype.itemsize
        return self._memory[place : place + count].view(dtype).view(shape)

    def _place(self, values: Tensor) -> int:
        return values.data_ptr() - self._start


def _whole(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _size(window_bytes: int, batch_bytes: int) -> int:
    return _PAGE + 2 * _whole(window_bytes) + 2 * _whole(batch_bytes)


def _opened(path: str, size: int, token: bytes) -> mmap.mmap | None:
    """The leader's memory, if that is what the path is here: another machine may have such a process, too."""
    with suppress(OSError, ValueError):  # ValueError: shorter than asked for
        file = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        if memory[:_TOKEN] == token:
            return memory
    return None
