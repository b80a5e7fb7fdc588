"""Sweeps under Ray Tune: the trials of one process, more of them than fit, and what survives what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
from ray.util.state import list_placement_groups

import xlc_ray as xlc
from tests.cluster.actors import address
from tests.config.tree import ROOT
from tests.sweeps.make import sweep_in
from xlc_ray import files
from xlc_ray.cluster import runs
from xlc_ray.cluster.sweep import sweep
from xlc_ray.cluster.trial import TRIALS
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.training.saving import REQUEST

pytestmark = pytest.mark.cluster

GATES = {
    "dictionary.gate": {"choice": [{"kind": "batchtopk", "k": 3, "threshold_start": 3}, {"kind": "topk", "k": 2}]},
    "train.lr": {"choice": [0.01, 0.003]},
    "cluster.tensor_parallel": {"choice": [2], "when": {"dictionary.gate.kind": "topk"}},
    "cluster.replicas": {"choice": [2], "when": {"train.lr": 0.003}},
}
BROKEN = {"kind": "custom", "path": "tests.sweeps.broken:Broken"}


@pytest.fixture
def written(tmp_path):
    """written(**sections) → the path of a sweep's file."""

    def write(**sections):
        (tmp_path / "sweep.yaml").write_text(sweep_in(tmp_path, **sections).yaml())
        return str(tmp_path / "sweep.yaml")

    return write


def assert_same(got, want):
    order = ["out", "error"]
    pd.testing.assert_frame_equal(got.drop(columns=order), want.drop(columns=order), rtol=1e-6)


@pytest.mark.slow
def test_more_trials_than_fit_give_the_frame_of_one_process_and_all_workers_back(cluster, written, tmp_path):
    """1, 2 and 4 workers a trial, of which the cluster holds 4 at once: shards and replicas change nothing."""
    path = written(space=GATES, changes={"cluster.cpus_per_worker": 1})
    found = sweep(path).frame()
    assert set(found["state"]) == {"finished"}
    assert_same(found, sweep(path, {"out": str(tmp_path / "local")}, local=True).frame())
    assert [group.state for group in list_placement_groups(address()) if group.state != "REMOVED"] == []
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4


@pytest.mark.slow
def test_a_crash_is_retried_from_the_last_stop_and_a_hopeless_trial_is_failed_alone(cluster, written, tmp_path):
    crashes = BROKEN | {"options": {"at": 6, "marker": str(tmp_path / "crashed")}}
    gates = [{"kind": "relu"}, crashes, BROKEN | {"options": {"at": 0, "rank": 1}}]
    path = written(
        space={"dictionary.gate": {"choice": gates}, "cluster.tensor_parallel": {"choice": [2]}},
        asha={"grace": 4, "rungs": [4], "reduction": 1.01},
        changes={"cluster.max_failures": 1, "train.checkpoint_every": 100, "train.loss": {}},
    )
    found = sweep(path).frame()
    assert list(found["state"]) == ["finished", "finished", "failed"]
    assert (tmp_path / "crashed").exists()
    assert "this gate never works" in found["error"][2], "and not that rank 0 lost its connection to rank 1"
    assert found["fvu"][1] == pytest.approx(found["fvu"][0], rel=1e-9), "it computes what relu does"
    assert files.read_json(str(tmp_path / "sweep/sweep.json"))["failed"] == 1


@pytest.mark.slow
def test_a_trial_that_is_asked_to_stop_leaves_at_a_checkpoint_and_its_words_are_told_apart(cluster, written, tmp_path):
    path = written(space={"train.lr": {"choice": [0.01, 0.003]}, "cluster.tensor_parallel": {"choice": [2]}})
    files.write_bytes(f"{tmp_path}/sweep/trials/lr=0.01,tensor_parallel=2/{REQUEST}", b"")
    found = sweep(path).frame()
    assert list(zip(found["trial"], found["state"], found["step"], strict=True)) == [
        ("lr=0.01,tensor_parallel=2", "stopped", 8),
        ("lr=0.003,tensor_parallel=2", "finished", 12),
    ]
    assert checkpoint.steps(found["out"][0])[-1] == 8
    logs = runs.find(str(tmp_path / "sweep"))[0].driver.logs
    said = [text.split() for file in Path(logs).glob("worker-*.out") if TRIALS in (text := file.read_text())]
    assert {word for words in said for word in words} >= {TRIALS, *found["trial"]}


@pytest.mark.slow
def test_trials_that_share_a_stream_on_two_ranks_are_those_of_one_process(cluster, written, tmp_path):
    """Cut trials leave their group, which goes on; two streams, by the number of ranks."""
    space = GATES | {"cluster.replicas": {"choice": [2], "when": {"dictionary.gate.kind": "topk"}}}
    asha, search = {"grace": 4, "reduction": 2}, {"metric": "fvu"}
    path = written(space=space, asha=asha, search=search, share_activations=True)
    found = sweep(path).frame()
    slow = found["train.lr"] == 0.003
    assert set(found["state"][slow]) == {"stopped"}
    assert set(found["step"][slow]) == {4}, "one of each group leaves the other, which goes on"
    alone = sweep(path, {"out": str(tmp_path / "alone"), "asha": None, "share_activations": False}, local=True).frame()
    done = found["state"] == "finished"
    assert done.any()
    assert_same(found[done], alone[done])
    assert [run.name for run in runs.find(str(tmp_path / "sweep"))][1:] == [
        f"sweep/{t}" for t in sorted(found["trial"])
    ]
    assert runs.find(str(tmp_path / "sweep"))[0].state == "finished", "as jobs/monitor.py tells"


@pytest.mark.slow
def test_a_group_that_crashes_parts_and_only_the_trial_at_fault_fails(cluster, written, tmp_path):
    gates = [{"kind": "relu"}, BROKEN | {"options": {"at": 6}}, {"kind": "topk", "k": 2}]
    changes = {"cluster.max_failures": 1, "train.loss": {}}
    path = written(space={"dictionary.gate": {"choice": gates}}, share_activations=True, changes=changes)
    found = sweep(path).frame()
    assert list(found["state"]) == ["finished", "failed", "finished"]
    assert "this gate never works" in found["error"][1]
    gates[1] = BROKEN | {"options": {"at": 6, "mistake": True}}
    path = written(space={"dictionary.gate": {"choice": gates}}, share_activations=True, changes=changes)
    found = sweep(path, {"out": str(tmp_path / "mistaken")}).frame()
    assert list(found["state"]) == ["finished", "failed", "finished"]
    assert found["error"][1] == "gate: a mistake"


def test_a_trial_larger_than_the_cluster_is_said_at_once(cluster, written):
    with pytest.raises(UserError, match="trial replicas=5 needs 5 CPUs at once, the cluster has 4"):
        sweep(written(space={"cluster.replicas": {"choice": [1, 5]}}, changes={"cluster.cpus_per_worker": 1}))
    with pytest.raises(UserError, match=r"resources\.cpus: 1, but a trial takes 2"):
        sweep(written(space={"cluster.replicas": {"choice": [1, 4]}}, resources={"cpus": 1}))


@pytest.mark.slow
def test_a_killed_driver_resumes_to_the_frame_of_an_uninterrupted_sweep(written, tmp_path):
    path = written(space=GATES, changes={"train.steps": 60, "train.checkpoint_every": 5})
    whole = sweep(path, {"out": str(tmp_path / "whole")}, local=True).frame()
    out = str(tmp_path / "sweep")
    command = [sys.executable, str(ROOT / "jobs/sweep.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    log = open(tmp_path / "log", "w")  # noqa: SIM115
    driver = subprocess.Popen([*command, "--config", path], env=environment, cwd=tmp_path, stdout=log, stderr=log)
    deadline = time.monotonic() + 240
    while driver.poll() is None and time.monotonic() < deadline:
        done = files.exists(f"{out}/sweep.json") and (xlc.Sweep(out).frame()["state"] == "finished").sum()
        if done:
            break
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = xlc.Sweep(out).frame()
    assert 0 < (before["state"] == "finished").sum() < 4, (tmp_path / "log").read_text()[-2000:]
    kept = before[before["state"] == "finished"]["out"].iloc[0]
    written_at = os.stat(f"{kept}/metrics.jsonl").st_mtime_ns
    again = subprocess.run([*command, "--resume", out], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert_same(xlc.Sweep(out).frame(), whole)
    assert os.stat(f"{kept}/metrics.jsonl").st_mtime_ns == written_at
    assert "4 trials: 4 finished, 0 stopped early, 0 failed; 100% of the steps" in again.stdout


@pytest.mark.slow
def test_a_population_larger_than_the_cluster_is_that_of_one_process(cluster, written, tmp_path):
    """Two of four trials at once; two ranks each; then three in one worker group, of which one diverges."""
    space = {"train.lr": {"choice": [1e300, 0.01, 0.003, 1e-5]}}
    search = {"metric": "fvu"}
    path = written(
        space=space, search=search, pbt={"interval": 4}, changes={"cluster.replicas": 2, "cluster.cpus_per_worker": 1}
    )
    alone = sweep(path, {"out": str(tmp_path / "alone")}, local=True)
    assert files.read_json(f"{alone.out}/sweep.json")["replaced"] == 2
    for out, more in (("one", {}), ("shared", {"share_activations": True, "resources.sharing": 3})):
        found = sweep(path, {"out": str(tmp_path / out), **more})
        assert_same(found.frame(), alone.frame())
        assert [row.history for row in found.rows()] == [row.history for row in alone.rows()]
    assert [group.state for group in list_placement_groups(address()) if group.state != "REMOVED"] == []
