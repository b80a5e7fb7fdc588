"""Runs that are cut short in one layout and go on in another, and one rank of them:

    python -m tests.equivalence.resharding RANK WORLD TP FOLDER save|resume CASE …

`save` trains FOLDER/saved/CASE in replicas of TP ranks until a step after the second checkpoint; `resume` goes on in
FOLDER/LAYOUT/CASE, a copy of it, to the end.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.equivalence.cases import AUXK, L1, TANH
from tests.runs import Interrupted, interrupt_at, settings_in
from xlc_ray.activations import store
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards
from xlc_ray.training import loop

L0 = {"sparsity": {"kind": "l0", "coefficient": 0.1}}
L0_TARGET = {"sparsity": {"kind": "l0", "coefficient": 0.5, "target_l0": 3.0}}
CASES = {
    "batchtopk": {"dictionary.gate": {"kind": "batchtopk", "k": 3, "threshold_start": 3}, "train.loss": AUXK},
    "jumprelu": {"dictionary.gate": {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.5}, "train.loss": TANH},
    "gated": {"dictionary.gate": {"kind": "gated"}, "train.loss": L1, "dictionary.features": 11},
    "hard_concrete": {"dictionary.gate": {"kind": "hard_concrete", "final_beta": 0.4}, "train.loss": L0},
    "zscore": {"dictionary.gate": {"kind": "topk", "k": 3, "rank_by": "zscore"}, "train.loss": AUXK},
    "accumulated": {
        "dictionary.gate": {"kind": "batchtopk", "k": 3, "rank_by": "zscore"},
        "train.loss": AUXK,
        "train.accumulate": 2,
    },
    "noise_accumulated": {
        "dictionary.gate": {"kind": "hard_concrete", "final_beta": 0.4},
        "train.loss": L0_TARGET,
        "train.accumulate": 2,
    },
    "resampled": {
        "dictionary.gate": {"kind": "topk", "k": 1, "rank_by": "decoder_norm"},
        "train.loss": {},
        "train.resample": {"every": 5, "tokens": 80, "warmup": 3},
        "train.dead_after_tokens": 40,
    },
    # Blocks of 256 moments tile the shards of 1, 2 and 4 ranks alike; biases are too short to be quantised.
    "int8": {"dictionary.features": 3072, "train.optimizer": {"states": "int8"}, "train.clip_norm": 0.1},
}
CUT, EVERY = 7, 3  # the steps after checkpoint 6 are lost and done again


def settings(folder: Path, case: str, place: str) -> Config:
    """Of the run FOLDER/place/case, of 12 steps over the store in the folder; 10 features split 5+5 and 3+3+3+1."""
    base = {"train.precision": "float64", "train.clip_norm": 0.5, "dictionary.features": 10, "train.log_every": 1}
    changes = base | {"train.checkpoint_every": EVERY} | CASES[case] | {"out": f"{folder}/{place}/{case}"}
    return settings_in(folder, changes)


def go(config: Config, shards: Shards, until: int) -> None:
    """Train to a step, as a worker does, and not beyond it."""
    data = store.open_store(config.source.path)
    reader = loop.in_process(config, data, shards)
    with contextlib.suppress(Interrupted):
        loop.train_rank(config, data, shards, reader, torch.device("cpu"), interrupt_at(until), lambda *_: None)


def main(rank: int, world: int, tp: int, folder: Path, task: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{task}_{world}", rank=rank, world_size=world)
    shards = Shards.of_world(tp, "cpu")
    for case in cases:
        if task == "resume":
            place = f"tp{tp}_dp{world // tp}"
            if rank == 0:
                shutil.copytree(folder / "saved" / case, folder / place / case)
            dist.barrier()
            go(settings(folder, case, place), shards, sys.maxsize)
        else:
            if rank == 0:
                loop.prepare(settings(folder, case, "saved"))
            go(settings(folder, case, "saved"), shards, CUT)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), sys.argv[5], sys.argv[6:])
