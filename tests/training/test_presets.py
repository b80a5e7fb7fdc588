"""The file of each preset trains: a few steps on a small store of sparse combinations of directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.activations import build
from tests.config.tree import PRESETS
from xlc_ray.activations import store
from xlc_ray.config import load_config
from xlc_ray.training import train_alone

LAYERS, WIDTH, ROWS = 4, 12, 600


@pytest.fixture(scope="module")
def small_store(tmp_path_factory) -> str:
    """MLP inputs and outputs and residual streams of four layers: each made of few of 24 directions of its own."""
    path = str(tmp_path_factory.mktemp("presets") / "store")
    kinds = ("mlp_in", "mlp_out", "resid_pre", "resid_post")
    sites = {f"{kind}.{layer}": WIDTH for layer in range(LAYERS) for kind in kinds}
    draw = torch.Generator().manual_seed(5)
    codes = torch.rand(ROWS, 24, generator=draw) * (torch.rand(ROWS, 24, generator=draw) < 0.1)
    arrays = {
        site: store.encode(3 * codes @ torch.randn(24, WIDTH, generator=draw) + 0.3, "float32", site) for site in sites
    }
    store.begin(path, build.identity(sites, "float32"))
    store.write_text(path, build.chunk_text(0, ROWS))
    store.write_chunk(path, 0, arrays, "float32")
    store.write_plan(path, [ROWS])
    store.finish(path, build.identity(sites, "float32"))
    return path


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_the_file_of_a_preset_trains(file: Path, small_store, tmp_path):
    sizes = {"dictionary.features": 48, "train.steps": 60, "train.batch_tokens": 128, "train.dead_after_tokens": 512}
    config = load_config(
        file,
        {
            "out": str(tmp_path / "run"),
            "source.path": small_store,
            "model.name": "tiny",
            **sizes,
            "train.log_every": 60,
        },
    )
    if config.train.loss.sparsity:  # a tenth of the width has a tenth of the error
        config = config.override({"train.loss.sparsity.coefficient": config.train.loss.sparsity.coefficient / 10})
    else:
        config = config.override({"dictionary.gate.k": 6})
    train_alone(config)
    first, *_, last = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    groups = sum(key.startswith("l0/group") for key in first)
    assert whole(config.train.loss, last) < 0.9 * whole(config.train.loss, first)
    assert last["explained_variance"] > 0.5 + first["explained_variance"]
    assert 0 < last["l0"] < 0.8 * 48 * groups


def whole(loss, line: dict) -> float:
    """The loss with the penalty at its full weight, as it is not while it warms up."""
    penalty = loss.sparsity.coefficient * line["sparsity"] if loss.sparsity else 0.0
    return line["reconstruction"] + penalty
