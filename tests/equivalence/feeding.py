"""Two ranks of a replica take the batches of a store, and one of them:

    python -m tests.equivalence.feeding RANK FOLDER HOW

leaves FOLDER/HOW_RANK.json: whether the ranks looked at the same memory, and the first batch that was wrong. `late`:
rank 1 looks at each batch only some time after the leader has gone on. `apart`: rank 1 cannot open the leader's memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.activations.build import SITES
from xlc_ray.activations import source, store
from xlc_ray.activations.order import Order
from xlc_ray.dictionary import Shards
from xlc_ray.training import feed, rooms

ROWS, COUNT = 24, 40


def main(rank: int, folder: Path, how: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{how}", rank=rank, world_size=2)
    shards, opened = Shards.of_world(2, "cpu"), []
    if how == "apart" and rank == 1:
        rooms._opened = lambda path, size, token: None
    of_replica = rooms.Rooms.of_replica

    def noted(*args):
        opened.append(of_replica(*args))
        return opened[-1]

    feed.Rooms.of_replica = noted
    data = store.open_store(f"{folder}/store")
    what = data, Order(data.chunk_rows, 1, 16, 5), list(SITES), source.Share(ROWS, 0, COUNT)

    def read(memory: source.Memory) -> feed.Batches:
        assert rank == 0, "only the leader reads"
        return source.batches(*what, memory)

    wrong = None
    found = feed.shared(read, COUNT, feed.Shape(SITES, ROWS, torch.bfloat16, 80), shards, torch.device("cpu"))
    for number, (batch, wanted) in enumerate(zip(found, source.batches(*what), strict=True)):
        if how == "late" and rank == 1:
            time.sleep(0.02)  # the leader asks for the next batch, and reads as far as it may
        if wrong is None and not all(torch.equal(batch[site], wanted[site]) for site in SITES):
            wrong = number
    Path(folder, f"{how}_{rank}.json").write_text(json.dumps({"shared": opened[0].shared, "wrong": wrong}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
