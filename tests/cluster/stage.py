"""A cluster, a store, and an undisturbed run, with which runs that something happened to are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.activations.build import make
from tests.cluster.nodes import Job, Nodes
from tests.runs import SITES, settings_in
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards, checkpoint
from xlc_ray.training import train_alone

STEPS, EVERY = 240, 60
NODES = 3


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    failure: str
    recovered: bool
    parameters_equal: bool
    seconds_to_recover: float
    steps_lost: int


class Stage:
    """The cluster, a folder, the store, and the result of an undisturbed run."""

    def __init__(self, folder: Path, nodes: type[Nodes]) -> None:
        self.folder = folder
        make(folder / "store", [2000, 2000, 823], dtype="float32", sites=SITES)
        changes = {
            "train.steps": STEPS,
            "train.checkpoint_every": EVERY,
            "train.log_every": 1,
            "train.precision": "float64",
            "train.batch_tokens": 48,
            "cluster.cpus_per_worker": 0.6,
            "cluster.hang_timeout_s": 120.0,
        }
        self.settings = settings_in(folder, changes)
        self.nodes = nodes(NODES)
        self.reference = self.config("undisturbed")
        train_alone(self.reference)

    def close(self) -> None:
        """The end of the cluster."""
        self.nodes.close()

    def config(self, name: str, **cluster: object) -> Config:
        """Settings of a run."""
        changes = {f"cluster.{key}": value for key, value in cluster.items()}
        return self.settings.override({"out": str(self.folder / name), **changes})

    def train(self, name: str, **cluster: object) -> Job:
        """A training job, once all nodes are there."""
        self.nodes.fill(NODES)
        return self.start(name, **cluster)

    def start(self, name: str, **cluster: object) -> Job:
        """A training job on the nodes that are there."""
        return Job("train", self.config(name, **cluster), self.nodes)

    def outcome(self, failure: str, job: Job, failed: float, made: int, recovered: float | None = None) -> Outcome:
        """What became of a run that failed when `made` lines of metrics were there."""
        recovered = recovered or job.goes_on(made)
        ended = job.finish() == 0 and checkpoint.steps(job.config.out)[-1:] == [STEPS]
        again = job.steps()[made - 1] + 1 - job.steps()[made]
        return Outcome(failure, ended, ended and self.equal(job), round(recovered - failed, 1), again)

    def equal(self, job: Job) -> bool:
        """Whether the parameters are those of the undisturbed run."""
        return equal(job.config.out, self.reference.out)


def equal(run: str, other: str) -> bool:
    """Whether two runs ended with the same parameters, moments, thresholds and counters, to 1e-9."""
    found, wanted = map(state, (run, other))
    assert {value.dtype for value in wanted.values() if value.is_floating_point()} >= {torch.float64}
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-9) for name, value in wanted.items()
    )


def state(run: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, as they are stored, by name."""
    step = checkpoint.steps(run)[-1]
    stored = dcp.FileSystemReader(f"{run}/checkpoints/step_{step}").read_metadata().state_dict_metadata
    tensors = {name: torch.empty(what.size, dtype=what.properties.dtype) for name, what in stored.items()}
    checkpoint.load(run, step, tensors, Shards())
    return tensors
