"""Runs that train on a stream of their own and together on one, and one rank of them:

    python -m tests.equivalence.sharing RANK WORLD TP FOLDER

leaves FOLDER/alone/CASE and FOLDER/shared/CASE; `topk` leaves the others at step 4.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.runs import settings_in
from xlc_ray.activations import store
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards
from xlc_ray.training import loop
from xlc_ray.training.together import Run, Together

LEAVES = "topk", 4
CASES = {
    "batchtopk": {},
    "topk": {"dictionary.gate": {"kind": "topk", "k": 2}},
    "shorter": {"train.lr": 0.003, "train.steps": 9},
    "noisy": {
        "dictionary.gate": {"kind": "hard_concrete"},
        "train.loss": {"sparsity": {"kind": "l0", "coefficient": 0.1}},
    },
}


def settings(folder: Path, case: str, place: str) -> Config:
    """Settings of a case: a checkpoint every other step, so that writes of several runs go on at once."""
    more = {"out": f"{folder}/{place}/{case}", "train.checkpoint_every": 2, "train.keep": 6}
    return settings_in(folder, CASES[case] | more)


def go(folder: Path, cases: list[str], place: str, shards: Shards) -> None:
    """Train these together, as the workers of a sweep do."""
    configs = {case: settings(folder, case, place) for case in cases}
    if dist.get_rank() == 0:
        for config in configs.values():
            loop.prepare(config)
    dist.barrier()
    longest = max(configs.values(), key=lambda config: config.train.steps)
    data = store.open_store(longest.source.path)
    runs = {case: Run(config, stops=(4, 8)) for case, config in configs.items()}
    group = Together(runs, data, shards, loop.in_process(longest, data, shards), torch.device("cpu"))
    while group.names:
        group.advance()
        if LEAVES[0] in group.names and group.step == LEAVES[1] and len(cases) > 1:
            group.leave(LEAVES[0])


def main(rank: int, world: int, tp: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    shards = Shards.of_world(tp, "cpu")
    for case in CASES:
        go(folder, [case], "alone", shards)
    go(folder, list(CASES), "shared", shards)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
