"""Live training's source of chunks: an actor that has language models make them as training comes to need them.

Which windows of the stream need which chunks is known beforehand (order.py). A chunk is begun when it is the next to be
needed and fewer than `source.held_chunks` are held; it is let go when all replicas are past its last window. So the
object store holds that many at most, however slow training is; and a model that is killed, or training that starts
again, costs chunks that are made once more, and changes none. Where this actor itself dies, the worker group fails at
its next request and begins again from the newest checkpoint.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from xlc_ray.activations import store
from xlc_ray.activations.order import Need
from xlc_ray.activations.source import Share
from xlc_ray.activations.writing import missing_chunks, read_record
from xlc_ray.cluster.models import Models
from xlc_ray.config import Config
from xlc_ray.config.sources import LiveSource
from xlc_ray.training.loop import order_for

WRITERS = 2
"""Chunks written at once, with `source.tee`."""

Key = tuple[int, int]
"""(epoch, chunk)."""


@dataclass(frozen=True)
class Asker:
    """Who asks for chunks: a replica of one worker group, whose first batch begins in window `begin`."""

    attempt: str
    """Groups by time: a later one is greater."""
    begin: int
    replica: int
    replicas: int


@dataclass
class Chunk:
    """One that is held: begun, made, or still being written."""

    need: Need
    made: asyncio.Future[ray.ObjectRef]
    writing: bool


class Generators:
    """What the replicas of a run ask for chunks. One event loop: no two lines of this run at the same time."""

    def __init__(self, config: Config, sites: Sequence[str], places: Sequence[Any] = ()) -> None:
        """`places`: as in Models."""
        assert isinstance(config.source, LiveSource)
        self._data = replace(store.open_source(config.source), patience=config.cluster.read_retry_s)
        self._limit, self._tee = config.source.held_chunks, config.source.tee is not None
        self._sites = list(self._data.manifest.sites if self._tee else sites)
        self._order = order_for(config, self._data.chunk_rows)
        self._stop = Share(config.train.batch_tokens, 0, config.train.steps).windows(self._order).stop
        self._models = Models(config, self._sites, hurry=lambda: bool(self._asking), places=places)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers = asyncio.Semaphore(WRITERS)
        self._facts = dict.fromkeys(("made", "read", "written", "most_held"), 0)
        self._asked: dict[Key, asyncio.Future[ray.ObjectRef]] = {}
        self._forget("")

    def _forget(self, attempt: str) -> None:
        """Begin anew, for another worker group."""
        for future in self._asked.values():
            future.cancel()
        self._attempt, self._replicas = attempt, 0
        self._failure: BaseException | None = None
        self._asking: set[int] = set()
        self._at: dict[int, float] = {}
        self._held: dict[Key, Chunk] = {}
        self._asked = {}
        self._coming: Iterator[Need] = iter(())
        chunks = range(len(self._data.chunk_rows))
        self._stored = set(chunks) - set(missing_chunks(self._data.path, len(chunks)))

    async def rest(self) -> None:
        """Hold nothing and give all language models back, so that a worker group finds room before they do."""
        self._forget("")
        self._models.release()

    async def chunks(self, asker: Asker, window: int, chunks: Sequence[int], first: bool) -> list[ray.ObjectRef]:
        """Of each of the chunks that a window wants: the reference to {site: [rows, width]}, once all are made.

        Says that the replica is past the windows before; `first`: that it asks for the first time. Raises what making a
        chunk raised, and RuntimeError where another of these was asked before, which died."""
        if asker.attempt > self._attempt:
            if not first:  # how far the others are, who may be waiting for this one, is not known any more
                raise RuntimeError("the actor that held the chunks of live training died")
            self._forget(asker.attempt)
            self._replicas, self._coming = asker.replicas, self._order.needs(asker.begin, self._stop)
        if self._failure:
            raise self._failure
        wanted = [self._future((window // self._order.epoch_windows, chunk)) for chunk in chunks]
        self._asking.add(asker.replica)
        self._past(asker.replica, window)
        try:
            return list(await asyncio.gather(*wanted))
        finally:
            self._asking.discard(asker.replica)

    async def done(self, asker: Asker) -> None:
        """The replica asks for no more."""
        if asker.attempt == self._attempt:
            self._past(asker.replica, math.inf)

    async def facts(self) -> dict[str, int]:
        """Chunks `made`, `read` (they were stored) and `written`, `most_held` at once, `most_models` at once."""
        return self._facts | {"most_models": self._models.most}

    async def models(self) -> Counter[str]:
        """Language models by the id of their node."""
        return self._models.by_node()

    async def close(self) -> dict[str, int]:
        """The facts, once everything is written; language models are given back. Raises what writing raised."""
        while self._failure is None and any(chunk.writing for chunk in self._held.values()):
            await asyncio.sleep(0.02)
        self._models.release()
        if self._failure:
            raise self._failure
        return await self.facts()

    def _future(self, key: Key) -> asyncio.Future[ray.ObjectRef]:
        if key not in self._asked:
            self._asked[key] = asyncio.get_running_loop().create_future()
        return self._asked[key]

    def _past(self, replica: int, window: float) -> None:
        self._at[replica] = window
        self._move()
        self._models.look()

    def _move(self) -> None:
        """Let go of what no replica wants any more, and begin what comes next."""
        low = min(self._at.values()) if len(self._at) == self._replicas else -1
        for key, chunk in list(self._held.items()):
            if chunk.need.last < low and not chunk.writing:
                del self._held[key], self._asked[key]
        while len(self._held) < self._limit and (need := next(self._coming, None)):
            key, stored = (need.epoch, need.chunk), need.chunk in self._stored
            chunk = self._held[key] = Chunk(need, self._future(key), self._tee and not stored)
            self._facts["most_held"] = max(self._facts["most_held"], len(self._held))
            self._start(self._get(chunk, stored))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(functools.partial(self._ended, self._attempt))

    def _ended(self, attempt: str, task: asyncio.Task[None]) -> None:
        """Of what failed, all who wait or will ask are told; not those of a later worker group."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and attempt == self._attempt:
            self._failure = error
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(error)

    async def _get(self, chunk: Chunk, stored: bool) -> None:
        """Make a chunk, or read it where it is stored; write it, if that is wanted."""
        index = chunk.need.chunk
        if stored:
            answer: Any = _stored_chunk.remote(self._data, index, self._sites)
            values, there = answer
            await there
        else:
            values = await self._models.make(index)
        self._facts["read" if stored else "made"] += 1
        if not chunk.made.done():
            chunk.made.set_result(values)
        if chunk.writing:
            async with self._writers:
                await _write_chunk.remote(self._data.path, index, values, self._data.dtype)
            self._facts["written"] += 1
            self._stored.add(index)
            chunk.writing = False
            self._move()


@ray.remote(num_cpus=0, num_returns=2)
def _stored_chunk(data: store.Store, index: int, sites: list[str]) -> tuple[dict[str, Any], None]:
    record = read_record(data.path, index)
    one = store.Store(data.path, data.manifest.model_copy(update={"chunks": (record,)}), patience=data.patience)
    return one.read(0, 0, record.rows, sites), None


@ray.remote(num_cpus=0)
def _write_chunk(path: str, index: int, values: dict[str, Any], dtype: str) -> None:
    store.write_chunk(path, index, values, dtype)
