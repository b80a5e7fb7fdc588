"""Documents → token windows of both splits on Ray, in an order that depends on nothing but text and settings.

One task packs `documents_per_task` consecutive documents. One process reads the text, so that a stream from the Hub is
read once; packing, the slow part, runs on all CPUs. The consumer stops when it has enough. Tasks of Ray and not a
pipeline of Ray Data: that is ended early by cancelling its tasks, and one that completes at that very moment aborts the
process that called (a failed check in Ray 2.60's task manager). Here those under way end by themselves.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import ray

from xlc_ray.activations.text import (
    Windows,
    is_held_out,
    load_tokenizer,
    pack,
    read_documents,
    special_ids,
    token_mask,
)
from xlc_ray.config import Config, Model, Text

Packed = tuple[Windows, np.ndarray]
"""Windows and the mask of their kept tokens."""

AHEAD = 2
"""Tasks that wait beside one for each CPU, so that none stands still between two."""
SETTLE_S = 5.0
"""Seconds that are waited at most for tasks whose windows nobody wants any more."""


def tokenized(config: Config) -> Generator[dict[bool, Packed], None, None]:
    """For each run of documents, in order: {held out?: (windows, mask)}. Close the iterator to stop reading."""
    remote: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Reader)
    reader = remote.remote(config.text, config.generate.documents_per_task)
    pack_task = ray.remote(num_cpus=1)(pack_documents).options(name="tokenise")
    ahead = int(ray.cluster_resources().get("CPU", 1)) + AHEAD
    asked: deque[ray.ObjectRef] = deque()
    try:
        for task in itertools.count():
            asked.append(pack_task.remote(reader.read.remote(task), config.model, config.text))
            if len(asked) == ahead:
                packed = ray.get(asked.popleft())
                if packed is None:
                    return
                yield packed
    finally:  # the next stage counts the CPUs that are free
        if asked:
            ray.wait(list(asked), num_returns=len(asked), timeout=SETTLE_S)


def by_split(stream: Iterator[dict[bool, Packed]]) -> dict[bool, Iterator[Packed]]:
    """One iterator of (windows, mask) a split; both pull from the same stream. Close one that has enough."""
    waiting: dict[bool, deque[Packed]] = {True: deque(), False: deque()}

    def pull(held_out: bool) -> Iterator[Packed]:
        try:
            while True:
                while not waiting[held_out]:
                    found = next(stream, None)
                    if found is None:
                        return
                    for split, packed in found.items():
                        if split in waiting:
                            waiting[split].append(packed)
                yield waiting[held_out].popleft()
        finally:
            del waiting[held_out]

    return {held_out: pull(held_out) for held_out in (True, False)}


class Reader:
    """Documents by runs of `documents_per_task`, in an actor; one that was restarted skips to where it is asked."""

    def __init__(self, text: Text, documents_per_task: int) -> None:
        self._text, self._run = text, documents_per_task
        self._documents, self._next = read_documents(text), 0

    def read(self, task: int) -> list[Any]:
        """The documents of a task, none after the last."""
        if task < self._next:
            self._documents, self._next = read_documents(self._text), 0
        skip = (task - self._next) * self._run
        self._next = task + 1
        return list(itertools.islice(self._documents, skip, skip + self._run))


def pack_documents(documents: list[Any], model: Model, text: Text) -> dict[bool, Packed] | None:
    """Windows and masks of both splits; None without documents."""
    if not documents:
        return None
    tokenizer, special = _tokenizer(model)
    out: dict[bool, Packed] = {}
    for held_out in (True, False):
        chosen = [d for d in documents if is_held_out(d, text.held_out_fraction) is held_out]
        windows = pack(chosen, tokenizer, text)
        out[held_out] = windows, token_mask(windows, special, text)
    return out


@functools.lru_cache(maxsize=2)
def _tokenizer(model: Model) -> tuple[Any, np.ndarray]:
    """Tokenizer and special ids, loaded once a process."""
    tokenizer = load_tokenizer(model)
    return tokenizer, special_ids(tokenizer)
