"""One rank of a parity run: `python -m tests.equivalence.worker RANK WORLD TP STORE_FILE OUT`."""

import sys

import torch
import torch.distributed as dist

from tests.equivalence import cases
from xlc_ray.dictionary import Shards

if __name__ == "__main__":
    rank, world, tp = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=world)
    shards = Shards.of_world(tp, "cpu")
    sparse = {"dictionary.products": "sparse"}
    torch.save({case: cases.run(case, shards, **sparse) for case in cases.CASES}, f"{sys.argv[5]}/rank_{rank}.pt")
    dist.destroy_process_group()
