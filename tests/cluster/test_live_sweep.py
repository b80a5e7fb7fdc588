"""Sweeps on a live source: one language-model pass for all trials, each of which is what a store gives it alone."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import threading
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import ray
import torch

from tests.cluster.prepared import BATCH, LIVE, SITES, STORED, alive, copy_sample, settings_of
from tests.cluster.test_generate import contents
from tests.cluster.test_train import assert_same
from tests.sweeps.make import sweep as sweep_of
from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.source import Share
from xlc_ray.cluster import live, live_sweep
from xlc_ray.cluster.generate import generate
from xlc_ray.cluster.sweep import plan, sweep
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary.checkpoint import load_dictionary, steps
from xlc_ray.training import train_alone
from xlc_ray.training.loop import order_for

pytestmark = pytest.mark.cluster

STEPS, RUNG = 40, 20
SPACE = {"dictionary.gate.k": {"choice": [4, 2]}, "train.lr": {"choice": [0.01, 0.0001]}}
HALVING = {"asha": {"grace": RUNG, "rungs": [RUNG], "reduction": 2}, "search": {"metric": "fvu"}}


@pytest.fixture(scope="module")
def stored(cluster, tmp_path_factory):
    """Settings of training on everything stored, which generation has made."""
    config = settings_of(tmp_path_factory.mktemp("stored"), {"train.steps": STEPS, "train.keep": 10})
    generate(config)
    return config.override({"source": {**STORED, "path": config.source.path}})


def file_of(stored: Config, folder: Path, source=None, changes=None, **sections) -> str:
    """The file of a sweep, in `folder`, on a live source with what it begins with. `changes`: of the base."""
    here = copy_sample(stored.source.path, folder / "live")
    base = stored.override({"source": {**LIVE, "path": str(here), **(source or {})}, **(changes or {})})
    given = {"space": SPACE, "share_activations": True, "out": str(folder / "sweep"), **sections}
    (folder / "sweep.yaml").write_text(sweep_of(base.model_dump(mode="json"), **given).yaml())
    return str(folder / "sweep.yaml")


@pytest.fixture
def written(stored, tmp_path):
    return partial(file_of, stored, tmp_path)


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


def told(said: str) -> tuple[int, int]:
    """Chunks that were made and read, by what a sweep printed."""
    (found,) = re.findall(r"^live +([\d,]+) chunks made by language models, ([\d,]+) read$", said, re.MULTILINE)
    return int(found[0]), int(found[1])


def assert_all_given_back() -> None:
    deadline = time.monotonic() + 30
    while (left := alive("Generators") + alive("Harvesting")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4


@pytest.fixture(scope="module")
def swept(stored, tmp_path_factory):
    """A sweep of four trials on one stream, of which halving cuts two: its directory, and what it printed."""
    folder, said = tmp_path_factory.mktemp("swept"), io.StringIO()
    with redirect_stdout(said):
        found = sweep(file_of(stored, folder, **HALVING))
    return folder, found.frame(), said.getvalue()


@pytest.mark.slow
def test_one_pass_of_the_language_model_serves_all_trials_each_as_from_a_store_alone(swept, stored, tmp_path):
    _, frame, said = swept
    assert list(frame["state"]) == ["finished", "stopped", "finished", "stopped"]
    assert list(frame["step"]) == [STEPS, RUNG, STEPS, RUNG]
    for out in frame["out"]:
        assert_bits_of_a_store(out, stored, tmp_path)
    assert told(said) == (wanted(stored) - 2, 2), "each once, and none of the sample"
    assert_all_given_back()


@pytest.mark.slow
def test_a_sweep_that_goes_on_begins_at_the_text_where_its_trials_are(swept, tmp_path, capsys):
    folder, frame, _ = swept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "sweep"
    for file in (out / "sweep.yaml", *out.glob("trials/*/config.yaml")):
        file.write_text(file.read_text().replace(str(folder), str(tmp_path)))
    told_before = files.read_mapping(str(out / "sweep.json"))
    for row, last in zip([row for row in told_before["rows"] if row["state"] == "finished"], (30, RUNG), strict=True):
        row["state"], run = "running", out / row["out"]  # as a kill leaves it: one trial further than the other
        for step in steps(str(run)):
            if step > last:
                shutil.rmtree(run / f"checkpoints/step_{step}")
    files.write_json(str(out / "sweep.json"), told_before)
    again = sweep(resume=str(out)).frame()
    pd.testing.assert_frame_equal(again.drop(columns="out"), frame.drop(columns="out"))
    for mine, theirs in zip(again["out"], frame["out"], strict=True):
        states = [load_dictionary(run)[0].state_dict() for run in (mine, theirs)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    made, read = told(capsys.readouterr().out)
    config = load_dictionary(again["out"][0])[1]
    assert made + read == wanted(config, RUNG) < wanted(config)


@pytest.mark.slow
def test_trials_that_do_not_share_have_language_models_of_their_own(written, stored, tmp_path, capsys):
    space = {"train.lr": {"choice": [0.01, 0.003, 0.001]}}
    frame = sweep(written(space=space, share_activations=False)).frame()
    assert list(frame["state"]) == ["finished"] * 3
    for out in frame["out"]:
        assert_bits_of_a_store(out, stored, tmp_path)
    assert told(capsys.readouterr().out) == (3 * (wanted(stored) - 2), 3 * 2)
    assert_all_given_back()


@pytest.mark.slow
def test_a_killed_group_goes_on_and_tee_leaves_the_store_of_generation(written, stored, tmp_path):
    path, killed = str(tmp_path / "live"), []
    file = written(
        {"tee": path}, {"train.steps": 70, "cluster.replicas": 2}, space={"train.lr": {"choice": [0.01, 0.003]}}
    )

    def kill_one():
        while not steps(str(tmp_path / "sweep/trials/lr=0.01")):
            time.sleep(0.05)
        killed.extend(alive("ResourceTrainable"))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    frame = sweep(file).frame()
    killer.join()
    assert len(killed) == 1
    assert list(frame["state"]) == ["finished"] * 2
    for out in frame["out"]:
        config = load_dictionary(out)[1]
        alone = config.override({"out": f"{out}_alone", "source": stored.source.model_dump(), "cluster": {}})
        train_alone(alone)
        assert_same(config, alone)
    assert contents(path) == contents(stored.source.path)
    assert_all_given_back()


@pytest.mark.slow
def test_what_a_language_model_cannot_do_is_said_of_each_trial(written, tmp_path):
    file, text = written(space={"train.lr": {"choice": [0.01, 0.003]}}), tmp_path / "live/text/chunk_9.npz"
    text.unlink()
    frame = sweep(file).frame()
    assert list(frame["state"]) == ["failed"] * 2
    assert all(error.startswith(f"{text}: missing") for error in frame["error"])
    assert_all_given_back()


def test_what_finds_no_room_is_said_before_anything_starts(written):
    replicas = {"cluster.replicas": {"choice": [1, 4]}}
    with pytest.raises(
        UserError, match="trial replicas=4 with 2 language models needs 6 CPUs at once, the cluster has 4"
    ):
        sweep(written(space=replicas, changes={"cluster.cpus_per_worker": 1}))


def test_few_held_chunks_are_refused_and_many_bound_the_groups_at_once(written):
    file = written()
    few, trials = plan(file, {"base.source.held_chunks": 2}, None, None)
    data = store.open_source(few.base.source)
    with pytest.raises(UserError, match=r"source\.held_chunks: 2 are fewer than the \d+"):
        live_sweep.check(trials, {data.path: data})
    _, trials = plan(file, None, None, None)
    need = LIVE["held_chunks"] * live.chunk_bytes(data, SITES)
    (node,) = ray.nodes()
    memory = node["Resources"]["object_store_memory"]
    assert live_sweep.check(trials, {data.path: data}) == memory // need
