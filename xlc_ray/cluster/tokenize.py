"""Ray Data: documents → token windows of both splits, in an order that depends on nothing but text and settings.

One task packs `documents_per_task` consecutive documents. One process reads the text, so that a stream from the Hub is
read once; packing, the slow part, runs on all CPUs. The consumer stops when it has enough, and so does the pipeline.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from xlc_ray.activations.text import (
    Windows,
    is_held_out,
    load_tokenizer,
    pack,
    read_documents,
    special_ids,
    token_mask,
)
from xlc_ray.cluster.blocks import Tasks, data_context
from xlc_ray.config import Config, Model, Text

Packed = tuple[Windows, np.ndarray]
"""Windows and the mask of their kept tokens."""

ONE_ROW = 1
"""Target bytes of a block: less than any row, so that each row (the documents of a task) is a block of its own."""


def tokenized(config: Config) -> Generator[dict[bool, Packed], None, None]:
    """For each run of documents, in order: {held out?: (windows, mask)}. Close the iterator to stop reading."""
    read = functools.partial(_read, config.text, config.generate.documents_per_task)
    with ray.data.DataContext.current(data_context(ONE_ROW)):
        documents = ray.data.read_datasource(Tasks("Text", [read]), override_num_blocks=1, num_cpus=0)
        pack_task = functools.partial(pack_documents, model=config.model, text=config.text)
        packed = documents.map_batches(pack_task, batch_size=None, num_cpus=1)
        packed.set_name("tokenise")
    for batch in packed.iter_batches(batch_size=None, prefetch_batches=2):
        yield from (pickle.loads(row) for row in batch["packed"])


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


def _read(text: Text, documents_per_task: int) -> Iterator[pa.Table]:
    """One row, a list of consecutive documents, at a time; pickled, since a document is text, ids or messages."""
    documents = read_documents(text)
    while some := list(itertools.islice(documents, documents_per_task)):
        yield pa.table({"documents": pa.array([pickle.dumps(some)], pa.large_binary())})


def pack_documents(batch: dict[str, np.ndarray], model: Model, text: Text) -> dict[str, list[bytes]]:
    tokenizer, special = _tokenizer(model)
    rows = []
    for documents in map(pickle.loads, batch["documents"]):
        out: dict[bool, Packed] = {}
        for held_out in (True, False):
            chosen = [d for d in documents if is_held_out(d, text.held_out_fraction) is held_out]
            windows = pack(chosen, tokenizer, text)
            out[held_out] = windows, token_mask(windows, special, text)
        rows.append(pickle.dumps(out))
    return {"packed": rows}


@functools.lru_cache(maxsize=2)
def _tokenizer(model: Model) -> tuple[Any, np.ndarray]:
    """Tokenizer and special ids, loaded once a process."""
    tokenizer = load_tokenizer(model)
    return tokenizer, special_ids(tokenizer)
