"""What cannot work is one line before anything starts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tests.runs import small_run_in
from xlc_ray.activations.store import open_store
from xlc_ray.cluster import preflight
from xlc_ray.cluster.placement import Layout, Node, Place, nodes_now
from xlc_ray.cluster.preflight import Facts
from xlc_ray.cluster.session import connect
from xlc_ray.config import UserError
from xlc_ray.config.sources import LiveSource
from xlc_ray.training import loop, plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_run(tmp_path):
    (tmp_path / "run").mkdir()
    return small_run_in(tmp_path)


def of(config):
    """The arguments of `check`."""
    data = open_store(config.source.path)
    return config, data, loop.wiring_for(config, data)


def test_workers_leave_cpus_to_ray_data(small_run):
    config = small_run({"cluster.tensor_parallel": 2, "cluster.cpus_per_worker": 1})
    (line,) = preflight.room(config, [Node("n", "a", 2, 0)])
    assert "cluster.cpus_per_worker: the workers need 2 of the cluster's 2 CPUs" in line
    assert list(preflight.room(config, [Node("n", "a", 2.5, 0)])) == []


def test_ranks_of_a_replica_belong_on_one_node(small_run):
    four = {"cluster.tensor_parallel": 4, "cluster.gpus_per_worker": 1}
    nodes = [Node("n", "a", 64, 2), Node("m", "b", 64, 2)]
    (line,) = preflight.room(small_run(four), nodes)
    assert "cluster.tensor_parallel: no layout finds room: 4 ranks" in line
    assert "room for 2, 2" in line
    assert list(preflight.room(small_run(four | {"cluster.placement": "any"}), nodes)) == []
    assert list(preflight.room(small_run(four | {"cluster.fallback_tensor_parallel": [2]}), nodes)) == []


def test_windows_read_ahead_fit_the_object_store(small_run):
    config, data, wiring = of(small_run({"cluster.replicas": 2}))
    window = 32 * 24 * 2 / 2  # rows, numbers of a row (four sites of six), bytes, shared by two replicas
    need = 6 * window * 2
    place, nodes = Place(Layout(1, 2), ("n", "n")), [Node("n", "10.0.0.7", 4, 0)]
    assert list(preflight.object_stores(config, data, wiring, place, nodes, {"n": need})) == []
    (line,) = preflight.object_stores(config, data, wiring, place, nodes, {"n": need - 1})
    assert "source.window_slices: 8 slices of 4 rows of 48 bytes" in line
    assert "10.0.0.7" in line


def test_a_language_model_finds_room_beside_the_workers_of_live_training(small_run):
    config = small_run({"cluster.tensor_parallel": 2, "cluster.cpus_per_worker": 1, "cluster.cpus_per_model": 2})
    nodes = [Node("n", "a", 3, 0), Node("m", "b", 2, 0)]
    assert list(preflight.model_room(config, Place(Layout(2, 1), ("n", "n")), nodes)) == []
    (line,) = preflight.model_room(config, Place(Layout(2, 1), ("n", "n")), [Node("n", "a", 2.5, 0)])
    assert line.startswith("cluster.cpus_per_model: live training needs a node with 2 CPUs and 0 GPUs")
    assert "which leave 0.5 and 0" in line
    (line,) = preflight.model_room(config, Place(Layout(2, 1), ("n", "n")), nodes, models=2)
    assert "for each of 2 language models beside the workers, which leave 1 and 0, 2 and 0" in line
    gpu = config.override({"cluster.gpus_per_model": 1})
    assert len(list(preflight.model_room(gpu, Place(Layout(2, 1), ("n", "n")), nodes))) == 1


def test_chunks_of_live_training_fit_the_object_store(small_run):
    _, data, wiring = of(small_run())
    live, nodes = LiveSource(path="x", held_chunks=2), [Node("n", "10.0.0.7", 4, 0)]
    need = 2 * 90 * 24 * 2  # chunks, rows of the largest, numbers of a row (four sites of six), bytes
    assert list(preflight.held_chunks(live, data, wiring, nodes, {"n": need})) == []
    (line,) = preflight.held_chunks(live, data, wiring, nodes, {"n": need - 1})
    assert line.startswith("source.held_chunks: 2 chunks of ")
    assert "10.0.0.7" in line


def test_checkpoints_fit_the_disk(small_run, monkeypatch):
    config, _, wiring = of(small_run({"train.keep": 3}))
    each = 3 * 4 * plan.work(config, wiring).parameters
    free = SimpleNamespace(free=4 * each)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert list(preflight.disk(config, wiring)) == []
    free.free -= 1
    (line,) = preflight.disk(config, wiring)
    assert line.startswith("train.keep: 4 checkpoints of ")
    assert config.out in line
    for step in (4, 8, 12):  # a run that goes on has three of the four already
        (Path(config.out) / f"checkpoints/step_{step}").mkdir(parents=True)
        (Path(config.out) / f"checkpoints/step_{step}/complete.json").write_text(f'{{"step": {step}}}')
    assert list(preflight.disk(config, wiring)) == []
    assert list(preflight.disk(config.override({"out": "memory://run", "train.keep": 99}), wiring)) == []


@pytest.mark.parametrize(
    ("name", "value", "gpus", "wrong"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", False, None),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False, "ib0"),
        ("GLOO_SOCKET_IFNAME", "eth", False, "eth"),
        ("NCCL_SOCKET_IFNAME", "eth", True, None),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True, None),
        ("NCCL_SOCKET_IFNAME", "ib", True, "ib"),
        ("NCCL_SOCKET_IFNAME", "=eth", True, "eth"),
        ("NCCL_SOCKET_IFNAME", "=eth0:1", True, None),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True, None),
        ("NCCL_SOCKET_IFNAME", "ib", False, None),
    ],
)
def test_interfaces_exist(name, value, gpus, wrong):
    lines = list(preflight.network("10.0.0.7", Facts(("lo", "eth0"), {name: value}, {}), gpus))
    want = [f"{name}={value}: node 10.0.0.7 has no interface {wrong}; it has lo, eth0"] if wrong else []
    assert lines == want


def test_paths_that_a_node_does_not_see_are_named():
    (line,) = preflight.unseen("10.0.0.7", Facts((), {}, {"/data/store": False, "/data/run": True}))
    assert line.startswith("/data/store: node 10.0.0.7 does not see it")


def test_an_unknown_authentication_mode_is_said_before_ray_is_asked(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "tokn")
    with pytest.raises(UserError, match="RAY_AUTH_MODE: 'tokn' is unknown; allowed: disabled, token"):
        connect()


def test_every_node_sees_the_store_since_what_reads_takes_no_cpus(small_run, monkeypatch):
    nodes = [Node("head", "10.0.0.1", 0, 0), Node("n", "10.0.0.2", 4, 0)]
    config, data, wiring = of(small_run())
    blind = {"head": (data.path,), "n": ()}

    def ask(some, paths):
        return {n.address: Facts((), {}, {path: path not in blind[n.id] for path in paths}) for n in some}

    monkeypatch.setattr(preflight, "nodes_now", lambda free: nodes)
    monkeypatch.setattr(preflight, "ask", ask)
    gigabyte = {"object_store_memory": 1e9}
    facts = [{"NodeID": n.id, "Alive": True, "Resources": gigabyte} for n in nodes]
    monkeypatch.setattr(preflight.ray, "nodes", lambda: facts)
    with pytest.raises(UserError, match=rf"^{data.path}: node 10\.0\.0\.1 does not see it; put it on a file system"):
        preflight.check(config, data, wiring)
    with pytest.raises(UserError, match=rf"^{data.path}: node 10\.0\.0\.1 does not see it"):
        preflight.seen_by_all(data.path)
    blind["head"] = (config.out,)  # it holds no rank
    preflight.check(config, data, wiring)


@pytest.mark.cluster
def test_a_token_that_is_missing_is_one_line(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
    server = socket.create_server(("127.0.0.1", 0))  # answers, which is all that is asked before the token
    address = f"127.0.0.1:{server.getsockname()[1]}"
    environment |= {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": address, "HOME": str(tmp_path)}
    script = "from xlc_ray.cluster import cli, session; cli.run(lambda config: session.connect(), '')"
    command = [sys.executable, "-c", script, "--config", "configs/quickstart.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    server.close()
    assert done.returncode == 2, done.stderr
    assert "error: cluster: cannot be joined: " in done.stderr
    assert "RAY_AUTH_MODE = token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_all_that_is_wrong_is_said_at_once(cluster, small_run, monkeypatch):
    good = of(small_run({"cluster.tensor_parallel": 2}))
    preflight.check(*good)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    config, data, wiring = of(small_run({"cluster.tensor_parallel": 4, "cluster.cpus_per_worker": 1}))
    with pytest.raises(UserError) as error:
        preflight.check(config, data, wiring)
    assert "GLOO_SOCKET_IFNAME=nowhere0: node " in str(error.value)
    assert "leaves none to Ray Data" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.cluster
def test_nodes_answer_from_a_process_of_their_own(cluster):
    # Asked as if this driver were elsewhere, the node answers by a task.
    (node,) = nodes_now(free=False)
    task = ray.remote(num_cpus=0)(preflight.facts)
    by_task = ray.get(task.remote(["/", "/nowhere"]))
    assert by_task.sees == {"/": True, "/nowhere": False}
    assert "lo" in by_task.interfaces
    (found,) = preflight.ask([node], ["/"]).values()
    assert found.interfaces == by_task.interfaces
