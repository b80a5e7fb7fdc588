"""Sweeps for tests over the small run of tests/runs.py."""

from __future__ import annotations

from typing import Any

from tests.activations.build import make
from tests.runs import SITES, small_run_in
from xlc_ray.config.sweep import SweepConfig, sweep_of

LR = {"train.lr": {"choice": [0.01, 0.003]}}


def sweep_in(tmp_path, changes: dict[str, Any] | None = None, **sections: Any) -> SweepConfig:
    """A sweep over a small run whose store has a held-out part. `changes`: of the base."""
    base = small_run_in(tmp_path)({"train.precision": "float64", **(changes or {})})
    make(tmp_path / "store/held_out", [203], sites=SITES)
    return sweep(base.model_dump(mode="json"), **{"out": str(tmp_path / "sweep"), **sections})


def sweep(base: dict[str, Any], **sections: Any) -> SweepConfig:
    """A sweep of these sections over a base, as from a file."""
    tree = {"base": base, "out": "runs/sweep", **sections}
    if not tree.get("space") and not tree.get("cases"):
        tree["space"] = LR
    return sweep_of(tree, "sweep.yaml")
