"""A store, and beside it what live training begins with: the same text, held-out part and sample, nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ray
import ray.util.state

from xlc_ray.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS, CHUNK, BATCH = 6000, 254, 100
LIVE = {"kind": "live", "sample_tokens": 500, "mix_chunks": 3, "held_chunks": 6, "slice_rows": 16, "window_slices": 12}
STORED = {"kind": "store", "mix_chunks": 3, "slice_rows": 16, "window_slices": 12}
SITES = ("mlp_in.0", "mlp_out.0")


def tiny(directory: Any, changes: dict[str, Any] | None = None) -> Config:
    """Settings of a quick generation with the smallest model."""
    base = {
        "out": f"{directory}/run",
        "source.path": f"{directory}/store",
        "model.name": str(CONFIGS / "assets/tiny-austen-gpt2-d64"),
        "text.dataset": str(CONFIGS / "assets/austen.txt"),
        "generate.tokens": 5000,
        "generate.held_out_tokens": 600,
        "generate.chunk_tokens": 1500,
        "generate.batch_windows": 8,
        "generate.documents_per_task": 8,
        "text.held_out_fraction": 0.2,
        "cluster.tensor_parallel": 1,
    }
    return load_config(CONFIGS / "quickstart.yaml", base | (changes or {}))


def settings_of(folder: Any, changes: dict[str, Any] | None = None) -> Config:
    """A run of one transcoder on 24 chunks of two windows, each read alone."""
    base = {
        "generate.tokens": TOKENS,
        "generate.chunk_tokens": CHUNK,
        "generate.batch_windows": 1,
        "dictionary.wiring": {"kind": "transcoder", "layers": [0]},
        "dictionary.features": 32,
        "dictionary.gate": {"kind": "topk", "k": 4},
        "dictionary.normalization.kind": "none",  # the statistics of a store are of other rows
        "train.steps": 70,
        "train.batch_tokens": BATCH,
        "train.checkpoint_every": 10,
        "train.precision": "float64",
    }
    return tiny(folder, base | (changes or {}))


def copy_sample(stored: str, here: Path) -> Path:
    """Make of a complete store one whose training rows beyond the sample, two chunks, are still to be made."""
    path = Path(stored)
    kept = {
        path: ("identity.json", "text", "held_out", "records", "moments", "chunk_0.hdf5", "chunk_1.hdf5"),
        path / "records": ("chunk_0.json", "chunk_1.json"),
        path / "moments": ("chunk_0.npz", "chunk_1.npz"),
    }
    shutil.copytree(path, here, ignore=lambda folder, names: set(names) - set(kept.get(Path(folder), names)))
    return here


def alive(name: str) -> list[int]:
    """Process ids of the actors of a class, of this cluster: there may be others on the machine."""
    here, found = ray.get_runtime_context().gcs_address, [("state", "=", "ALIVE")]
    return [a.pid for a in ray.util.state.list_actors(address=here, filters=found, detail=True) if name in a.class_name]
