"""Short runs for tests: a small store of two layers' MLP inputs and outputs, and settings of a short run on it."""

from __future__ import annotations

from tests.activations.build import make
from xlc_ray.config import Config

SITES = {f"{kind}.{layer}": 6 for layer in (0, 1) for kind in ("mlp_in", "mlp_out")}


def small_run_in(tmp_path):
    """settings({dotted override: value}) → settings of a run of 12 steps over a store of 203 rows."""
    make(tmp_path / "store", [90, 90, 23], sites=SITES)
    return settings_in(tmp_path)


def settings_in(tmp_path):
    """The same, where the store is there."""

    def settings(changes: dict | None = None) -> Config:
        tree = {
            "out": str(tmp_path / "run"),
            "model": {"name": "tiny"},
            "text": {"dataset": "novels.txt"},
            "generate": {"tokens": 203, "held_out_tokens": 1},
            "source": {"path": str(tmp_path / "store"), "slice_rows": 4, "window_slices": 8},
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

    return settings
