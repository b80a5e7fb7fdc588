"""Sweeps on a live source: one language-model pass for all trials, each of which is what a store gives it alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import torch

from tests.cluster.prepared import BATCH, LIVE, STORED, alive, copy_sample, settings_of
from tests.cluster.test_generate import contents
from tests.config.tree import ROOT
from tests.sweeps.make import sweep as sweep_of
from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.source import Share
from xlc_ray.cluster.generate import generate
from xlc_ray.cluster.sweep import sweep
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary.checkpoint import load_dictionary, steps
from xlc_ray.sweeps.result import Sweep
from xlc_ray.training import train_alone
from xlc_ray.training.loop import order_for

pytestmark = pytest.mark.cluster

STEPS, RUNG = 40, 20
SPACE = {"dictionary.gate.k": {"choice": [4, 2]}, "train.lr": {"choice": [0.01, 0.0001]}}
HALVING = {"asha": {"grace": RUNG, "rungs": [RUNG], "reduction": 2}, "search": {"metric": "fvu"}}


@pytest.fixture(scope="module")
def stored(cluster, tiny_config, tmp_path_factory):
    """Settings of training on everything stored, which generation has made."""
    config = settings_of(tiny_config, tmp_path_factory.mktemp("stored"), {"train.steps": STEPS})
    generate(config)
    return config.override({"source": {**STORED, "path": config.source.path}})


@pytest.fixture
def written(stored, tmp_path):
    """written(source, changes, **sections) → the file of a sweep on a live source. `changes`: of the base."""
    here = copy_sample(stored.source.path, tmp_path / "live")

    def write(source=None, changes=None, **sections):
        base = stored.override({"source": {**LIVE, "path": str(here), **(source or {})}, **(changes or {})})
        given = {"space": SPACE, "share_activations": True, "out": str(tmp_path / "sweep"), **sections}
        (tmp_path / "sweep.yaml").write_text(sweep_of(base.model_dump(mode="json"), **given).yaml())
        return str(tmp_path / "sweep.yaml")

    return write


def assert_bits_of_a_store(out: str, stored: Config, folder: Path) -> None:
    """The parameters of a trial are those of training it alone, from the store, as far as it came."""
    found, config = load_dictionary(out)
    alone = config.override({"out": f"{folder}/{files.name(out)}", "source": stored.source.model_dump(), "cluster": {}})
    train_alone(alone)
    last = steps(out)[-1]
    want = load_dictionary(alone.out, last)[0].state_dict()
    assert all(torch.equal(value, want[name]) for name, value in found.state_dict().items()), (out, last)


def wanted(config: Config, first: int = 0) -> int:
    """Chunks that the steps from `first` on want, each once an epoch."""
    order = order_for(config, store.open_source(config.source).chunk_rows)
    windows = Share(BATCH, first, STEPS).windows(order)
    return len(list(order.needs(windows.start, windows.stop)))


def told(capsys) -> tuple[int, int]:
    """Chunks that were made and read, as the sweep said."""
    made, read = re.findall(
        r"^live +([\d,]+) chunks made by language models, ([\d,]+) read$", capsys.readouterr().out, re.M
    )[0]
    return int(made), int(read)


def assert_all_given_back() -> None:
    deadline = time.monotonic() + 30
    while (left := alive("Generators") + alive("Harvesting")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4


def test_one_pass_of_the_language_model_serves_all_trials_each_as_from_a_store_alone(written, stored, tmp_path, capsys):
    frame = sweep(written(**HALVING)).frame()
    assert list(frame["state"]) == ["finished", "stopped", "finished", "stopped"]
    assert list(frame["step"]) == [STEPS, RUNG, STEPS, RUNG]
    for out in frame["out"]:
        assert_bits_of_a_store(out, stored, tmp_path / "alone")
    assert told(capsys) == (wanted(stored) - 2, 2), "each once, and none of the sample"
    assert_all_given_back()


@pytest.mark.slow
def test_trials_that_do_not_share_have_language_models_of_their_own(written, stored, tmp_path, capsys):
    space = {"train.lr": {"choice": [0.01, 0.003, 0.001]}}
    frame = sweep(written(space=space, share_activations=False)).frame()
    assert list(frame["state"]) == ["finished"] * 3
    for out in frame["out"]:
        assert_bits_of_a_store(out, stored, tmp_path / "alone")
    assert told(capsys) == (3 * (wanted(stored) - 2), 3 * 2)
    assert_all_given_back()
