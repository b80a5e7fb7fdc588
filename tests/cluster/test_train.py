"""Training under Ray Train: the same result as one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from tests.cluster.actors import actors
from tests.runs import small_run_in
from xlc_ray.cluster.train import train
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.training import logs, train_alone

pytestmark = pytest.mark.cluster


@pytest.fixture
def small_run(tmp_path):
    return small_run_in(tmp_path)


def weights(config):
    return checkpoint.load_dictionary(config.out)[0].state_dict()


def assert_same(got, want):
    for name, value in weights(want).items():
        torch.testing.assert_close(weights(got)[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_shards_and_replicas_give_the_result_of_one_process(cluster, small_run):
    """Also pitfall 6: were replicas to read the same rows, the result would differ."""
    config = small_run({"train.precision": "float64", "cluster.tensor_parallel": 2, "cluster.replicas": 2})
    last = train(config)
    alone = config.override({"out": config.out + "_alone", "cluster.tensor_parallel": 1, "cluster.replicas": 1})
    want = train_alone(alone)
    assert_same(config, alone)
    assert last["step"] == want["step"] == 12
    for key in ("loss", "l0", "dead_features"):
        assert last[key] == pytest.approx(want[key], rel=1e-6)
    assert checkpoint.steps(config.out) == [8, 12]
    # A checkpoint of 2 × 2 ranks is one of any number of ranks.
    assert train_alone(config)["step"] == 12


@pytest.mark.slow
def test_gate_and_wiring_from_the_working_directory_reach_every_rank(cluster, small_run):
    own = {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.2}}
    near = {"kind": "custom", "path": "examples.own_wiring:near", "options": {"reach": 1}}
    ranks = {"train.precision": "float64", "cluster.tensor_parallel": 2}
    config = small_run({**ranks, "dictionary.gate": own, "dictionary.wiring": near})
    train(config)
    alone = config.override({"out": config.out + "_alone", "cluster.tensor_parallel": 1})
    train_alone(alone)
    assert_same(config, alone)
    assert "gate.theta.1" in weights(config)


def test_killed_worker_costs_only_the_steps_since_the_last_checkpoint(cluster, small_run):
    slow = {"train.steps": 400, "train.checkpoint_every": 50, "train.log_every": 10, "train.precision": "float64"}
    config = small_run({**slow, "cluster.tensor_parallel": 2})
    killed = threading.Event()

    def kill_one():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not checkpoint.steps(config.out):
            time.sleep(0.05)
        os.kill(actors("RayTrainWorker")[0].pid, signal.SIGKILL)
        killed.set()

    thread = threading.Thread(target=kill_one)
    thread.start()
    train(config)
    thread.join()
    assert killed.is_set()
    alone = config.override({"out": config.out + "_alone", "cluster.tensor_parallel": 1})
    train_alone(alone)
    assert_same(config, alone)
    logged = [line["step"] for line in logs.read(config.out)]
    assert {1, *range(10, 401, 10)} < set(logged), "and the first step after the failure"
    assert logged == sorted(set(logged))


def test_damaged_chunk_is_one_line_before_anything_starts(cluster, small_run, tmp_path):
    config = small_run()
    with (tmp_path / "store/chunk_1.hdf5").open("r+b") as file:
        file.seek(4000)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"chunk_1\.hdf5") as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not os.path.exists(config.out + "/metrics.jsonl")


def test_mistake_found_by_a_worker_reaches_the_user_without_restarts(cluster, small_run, tmp_path):
    """A chunk cut after the check, while training runs."""
    config = small_run({"source.verify": False, "cluster.tensor_parallel": 2})
    path = tmp_path / "store/chunk_1.hdf5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"chunk_1\.hdf5"):
        train(config)


def test_missing_store_names_the_way_to_make_one(cluster, small_run, tmp_path):
    with pytest.raises(UserError, match="no complete store") as error:
        train(small_run({"source.path": str(tmp_path / "nowhere")}))
    assert "jobs/generate.py" in str(error.value)


def test_more_workers_than_cpus_is_said_at_once(cluster, small_run):
    with pytest.raises(UserError, match="6 workers needs 12 CPUs"):
        train(small_run({"cluster.tensor_parallel": 6, "cluster.cpus_per_worker": 2}))
