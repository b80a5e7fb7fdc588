"""Sparse dictionaries of language models, trained on Ray.

import xlc_ray as xlc

config = xlc.load_config("configs/quickstart.yaml", {"train.lr": 3e-4})
xlc.generate(config)                 # text → activations
run = xlc.train(config)              # activations → a dictionary in run["out"]
xlc.evaluate(run["out"])             # eval.json, report.html
dictionary = xlc.load(run["out"])      # or what SAELens, circuit-tracer, … wrote
sweep = xlc.sweep("configs/sweeps/quickstart.yaml")  # many runs; sweep.frame(), sweep.pareto(), sweep.best("fvu")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xlc_ray.config import Config, UserError, load_config

if TYPE_CHECKING:
    from xlc_ray.cluster.compare import compare
    from xlc_ray.cluster.convert import convert
    from xlc_ray.cluster.evaluate import evaluate
    from xlc_ray.cluster.generate import generate
    from xlc_ray.cluster.sweep import sweep
    from xlc_ray.cluster.train import train
    from xlc_ray.export.formats import load
    from xlc_ray.sweeps.result import Sweep

__all__ = [
    "Config",
    "Sweep",
    "UserError",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "load",
    "load_config",
    "sweep",
    "train",
]

_ROOMS = {
    "compare": ("xlc_ray.cluster.compare", "compare"),
    "convert": ("xlc_ray.cluster.convert", "convert"),
    "evaluate": ("xlc_ray.cluster.evaluate", "evaluate"),
    "generate": ("xlc_ray.cluster.generate", "generate"),
    "sweep": ("xlc_ray.cluster.sweep", "sweep"),
    "Sweep": ("xlc_ray.sweeps.result", "Sweep"),
    "train": ("xlc_ray.cluster.train", "train"),
    "load": ("xlc_ray.export.formats", "load"),
}


def __getattr__(name: str) -> Any:
    """Import a job or the loader when it is first asked for: settings alone need neither torch nor Ray."""
    if name not in _ROOMS:
        raise AttributeError(f"module xlc_ray has no attribute {name!r}")
    import importlib

    module, attribute = _ROOMS[name]
    return getattr(importlib.import_module(module), attribute)
