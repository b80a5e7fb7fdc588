"""Peak memory of one rank that builds, saves and loads: `python -m tests.equivalence.memory RANK WORLD FOLDER`.

Prints a JSON object: bytes of this rank's parameters, and how far each task went beyond what was held before all.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.equivalence import cases
from xlc_ray.dictionary import Shards, checkpoint, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Learner

FEATURES, WIDTH = 8192, 256
CLT = wiring.clt([0, 1, 2], WIDTH)
LARGEST = 4 * FEATURES * WIDTH * 3
"""Bytes of the largest tensor: what the first layer writes."""


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak(task: Callable[[], object]) -> int:
    """The most memory that this process held during a task."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    task()
    return resident("VmHWM")


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    shards = Shards.of_world(world, "cpu")
    settings = cases.config({"kind": "jumprelu"}, cases.TANH, **{"train.precision": "float32"})
    section = settings.dictionary.model_copy(update={"features": FEATURES})
    made: list[Learner] = []

    def learner(seed: int) -> Learner:
        return Learner(build(section, CLT, seed, shards), settings)

    small = Learner(build(section.model_copy(update={"features": 64}), CLT, 0, shards), settings)
    small.save(f"{folder}/small")  # what a first checkpoint loads of libraries does not count
    small.resume(f"{folder}/small", 0)
    gc.collect()
    before, found = resident("VmRSS"), {}
    found["build"] = peak(lambda: made.append(learner(1))) - before
    found["save"] = peak(lambda: made[0].save(f"{folder}/run")) - before
    found["load"] = peak(lambda: made[0].resume(f"{folder}/run", 0)) - before

    def in_background() -> None:
        with checkpoint.Background() as background:
            made[0].save(f"{folder}/again", background)

    found["save in background"] = peak(in_background) - before
    found["parameters"] = sum(4 * p.numel() for p in made[0].parameters.values())
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
