"""Short end-to-end runs in float64, and one rank of them: `python -m tests.equivalence.spliced RANK FOLDER`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from tests.equivalence.cases import AUXK
from tests.training import texts
from xlc_ray.activations import store
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.build import build, normalize_by
from xlc_ray.training import Learner
from xlc_ray.training.end_to_end import EndToEnd
from xlc_ray.training.loop import wiring_for

STEPS, ROWS = 3, 60
BOTH = {"downstream": 0.2, "reconstruction": 0.05}
CASES = {
    "relu": {"train.loss": {"sparsity": {"kind": "l1", "coefficient": 0.1}}},
    "topk": {"dictionary.gate": {"kind": "topk", "k": 4}, "train.loss": AUXK, "dictionary.products": "sparse"},
    "batchtopk": {"dictionary.gate": {"kind": "batchtopk", "k": 4}, "train.loss": {}},
    "skip": {"dictionary.wiring": {"kind": "transcoder", "layers": [1, 2], "skip": True}, "train.loss": {}},
}


def run(folder: str, case: str, shards: Shards, **changes) -> dict[str, torch.Tensor]:
    """Metrics of every step, gradients of the first, parameters at the end; sharded ones: this rank's."""
    base = {"train.precision": "float64", "train.end_to_end": BOTH, "train.clip_norm": 0.5, "dictionary.features": 21}
    config = texts.settings(folder, base | CASES[case] | changes)
    data = store.open_store(config.source.path)
    dictionary = build(config.dictionary, wiring_for(config, data), config.seed, shards)
    normalize_by(dictionary, config.dictionary.normalization, config.dictionary.wiring.kind, data.statistics())
    learner = Learner(dictionary, config)
    frozen, found = EndToEnd(dictionary, config, data), {}
    for step in range(STEPS):
        metrics = learner.train_on(frozen.batch(step), ROWS // shards.replicas, measure=True) or {}
        metrics.pop("explained_variance")  # about a micro-batch's own mean
        found |= {f"metrics.{step}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()}
        if step == 0:
            found |= {f"grad.{k}": p.grad.clone() for k, p in learner.parameters.items() if p.grad is not None}
    return found | {f"final.{k}": p.detach().clone() for k, p in learner.parameters.items()}


def agreement(shards: Shards) -> torch.Tensor:
    """The gradient of a value of which rank r computed the gradient r + 1."""
    value = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (shards.agreed(value) * (shards.rank + 1)).sum().backward()
    assert value.grad is not None
    return value.grad


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    shards, replicas = Shards.of_world(2, "cpu"), Shards.of_world(1, "cpu")
    found = {case: run(folder, case, shards) for case in CASES}
    torch.save((found, run(folder, "topk", replicas), agreement(shards)), f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()
