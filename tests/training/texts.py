"""Small stores of real text for tests: what generation makes of it, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.documents import read_documents
from xlc_ray.activations.harvest import harvest_chunk
from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.text import chunk_plan, is_held_out, load_tokenizer, pack, special_ids, token_mask
from xlc_ray.activations.windows import Windows
from xlc_ray.config import Config, load_config

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "configs/assets/tiny-austen-gpt2-d64")
SITES = (
    "resid_pre.0",
    "mlp_in.1",
    "mlp_out.1",
    "resid_post.1",
    "mlp_in.2",
    "mlp_out.2",
    "resid_post.2",
    "resid_post.3",
)
CONTEXT = 24
DOCUMENTS = 24  # packed together


def settings(folder: Path | str, changes: dict | None = None) -> Config:
    """A run of 12 steps of 60 tokens: an SAE of resid_post.1 trained by the KL, on `folder/store`."""
    base = {
        "out": f"{folder}/run",
        "model.name": MODEL,
        "text": {"dataset": str(ROOT / "configs/assets/austen.txt"), "context": CONTEXT, "held_out_fraction": 0.3},
        "generate": {"tokens": 12000, "held_out_tokens": 600, "chunk_tokens": 5000, "dtype": "float32", "sites": SITES},
        "source.path": f"{folder}/store",
        "dictionary": {
            "wiring": {"kind": "sae", "layers": [1]},
            "features": 48,
            "gate": {"kind": "relu"},
        },
        "train": {
            "steps": 12,
            "batch_tokens": 60,
            "lr": 0.003,
            "log_every": 4,
            "checkpoint_every": 4,
            "dead_after_tokens": 120,
            "calibration_tokens": 500,
            "loss": {"sparsity": {"kind": "l1", "coefficient": 0.01}},
            "end_to_end": {},
        },
        "cluster": {},
        "evaluate": {"batch_windows": 16, "windows": 20},
    }
    return load_config(ROOT / "configs/quickstart.yaml", base | (changes or {}))


def make_store(folder: Path | str) -> None:
    """Both splits of `settings(folder)`, as the jobs make them."""
    harvest(settings(folder), SITES)


def harvest(config: Config, sites: Sequence[str]) -> None:
    """Both splits of the store that a run reads, in this process."""
    models, make = load_models(config, sites, "cpu"), config.generate
    tokenizer = load_tokenizer(config.model)
    special = special_ids(tokenizer)
    widths = {s: (models.of(s) if isinstance(models, ModelPair) else models).width for s in sites}

    def split(held_out: bool) -> Iterator[tuple[Windows, np.ndarray]]:
        documents = read_documents(config.text)
        while batch := list(islice(documents, DOCUMENTS)):
            chosen = [d for d in batch if is_held_out(d, config.text.held_out_fraction) == held_out]
            windows = pack(chosen, tokenizer, config.text)
            yield windows, token_mask(windows, special, config.text)

    for held_out, path in ((False, config.source.path), (True, files.join(config.source.path, "held_out"))):
        identity = store.identity(config, widths, held_out)
        store.begin(path, identity)
        tokens = make.held_out_tokens if held_out else make.tokens
        rows = []
        for chunk in chunk_plan(split(held_out), tokens, make.chunk_tokens, config.seed):
            store.write_text(path, chunk)
            values = harvest_chunk(models, chunk, sites, make.batch_windows, make.dtype)
            store.write_chunk(path, chunk.index, values, make.dtype)
            rows.append(chunk.rows)
        store.write_plan(path, rows)
        store.finish(path, identity)
