"""Short runs for tests: a small store of two layers' MLP inputs and outputs, settings of a short run on it, and what
such a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.activations.build import make
from xlc_ray.activations import store
from xlc_ray.config import Config
from xlc_ray.dictionary import Shards, checkpoint
from xlc_ray.dictionary.build import build
from xlc_ray.training import Learner
from xlc_ray.training.loop import wiring_for

SITES = {f"{kind}.{layer}": 6 for layer in (0, 1) for kind in ("mlp_in", "mlp_out")}


def small_run_in(tmp_path):
    """settings({dotted override: value}) → settings of a run of 12 steps over a store of 203 rows."""
    make_store(tmp_path)
    return partial(settings_in, tmp_path)


def make_store(folder: Path) -> None:
    """The store of the runs of a folder: 203 rows."""
    make(folder / "store", [90, 90, 23], sites=SITES)


def settings_in(folder: Path, changes: dict | None = None) -> Config:
    """Settings of a run of 12 steps over the store of a folder."""
    tree = {
        "out": str(folder / "run"),
        "model": {"name": "tiny"},
        "text": {"dataset": "novels.txt"},
        "generate": {"tokens": 203, "held_out_tokens": 1},
        "source": {"path": str(folder / "store"), "slice_rows": 4, "window_slices": 8},
        "dictionary": {
            "wiring": {"kind": "clt"},
            "features": 24,
            "gate": {"kind": "batchtopk", "k": 3, "threshold_start": 3},
        },
        "train": {
            "steps": 12,
            "batch_tokens": 40,
            "lr": 0.01,
            "log_every": 4,
            "checkpoint_every": 4,
            "dead_after_tokens": 80,
            "loss": {"auxk": {}},
        },
    }
    return Config.model_validate(tree).override(changes or {})


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Callable[[dict], None]:
    """What raises Interrupted when it hears of this step, or a later one."""

    def announce(metrics: dict) -> None:
        if metrics["step"] >= step:
            raise Interrupted

    return announce


def final_state(config: Config, step: int | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, the newest if not told, also the optimizer's, by name."""
    wiring = wiring_for(config, store.open_store(config.source.path))
    learner = Learner(build(config.dictionary, wiring, 99, Shards()), config)
    learner.resume(config.out, step or checkpoint.steps(config.out)[-1])
    return learner.state()
