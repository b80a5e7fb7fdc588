"""The engine split over processes by tensor parallelism, each of which steps when it is told to."""

from __future__ import annotations

import tempfile
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.benchmarks import timing, variants
from xlc_ray.dictionary.shards import Shards
from xlc_ray.training.learner import Learner


class Engine:
    """`tp` processes; on a CPU they share its threads, on GPUs each has its own."""

    def __init__(self, o, dtype: str):
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(o.tp):
            ours, theirs = context.Pipe()
            args = (rank, o, dtype, f"file://{self.folder.name}/meeting", theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def step(self, i: int, measure: bool = False) -> float | None:
        """One step on batch i; the loss before it where `measure`."""
        return self._ask(("step", i, measure))[0]

    def peak_bytes(self) -> int:
        """Peak memory of the rank that held most."""
        return max(self._ask(("peak",)))

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(("stop",))
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def _ask(self, order: tuple) -> list:
        for pipe in self.pipes:
            pipe.send(order)
        return [pipe.recv() for pipe in self.pipes]


def _serve(rank: int, o, dtype: str, meeting: str, orders: Connection) -> None:
    device = torch.device(o.device, rank) if o.device == "cuda" else torch.device(o.device)
    torch.set_num_threads(max(1, o.threads // o.tp))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=o.tp)
    config = variants.settings(o, dtype)
    wires = variants.wiring_of(o, config)
    batches = variants.batches(wires, o.batch, 2, device)
    shards = Shards.of_world(o.tp, device.type)
    learner = Learner(variants.dictionary_of(config, wires, o, batches[0], shards), config)
    while (order := orders.recv())[0] != "stop":
        if order[0] == "peak":
            orders.send(timing.peak_bytes(device))
            continue
        found = learner.train_step(batches[order[1] % len(batches)], order[2])
        orders.send(found and found["loss"])
    dist.destroy_process_group()
