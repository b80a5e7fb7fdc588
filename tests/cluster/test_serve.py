"""Serving from actors, and the pipelines of generation and training on a server's store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.activations.build import SITES, make
from tests.cluster.actors import actors
from xlc_ray import files
from xlc_ray.activations import source, store
from xlc_ray.activations.order import Order
from xlc_ray.cluster import data
from xlc_ray.cluster.generate import generate
from xlc_ray.cluster.serve import serve_nodes
from xlc_ray.config import UserError
from xlc_ray.config.sources import HttpSource
from xlc_ray.serving.places import Terms

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
TERMS = Terms(1 << 30, 1 << 26, 1 << 18)


@pytest.mark.slow
def test_generation_uploads_to_an_actor_and_ray_data_reads_back_the_same_batches(cluster, tmp_path, tiny_config):
    serving = serve_nodes("CPU", str(tmp_path / "root"), None, TERMS, 0)
    (url,) = serving.urls
    at_server = {"kind": "http", "url": url, "dataset_id": "tiny/austen_train"}
    config = tiny_config(tmp_path, {"source": at_server})
    done = generate(config)
    assert done["made"] == 5  # chunks: four of 1,500, and one held out
    assert generate(config)["made"] == 0
    # Nothing stays here, and what is there is what a directory would hold.
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    here = store.open_store(str(tmp_path / "root/tiny/austen_train"))
    store.open_store(files.join(here.path, "held_out")).verify()
    there = store.open_source(config.source)
    assert (there.manifest, here.manifest.tokens) == (here.manifest, 5000)
    there.verify()

    order, sites = Order(here.chunk_rows, 3, 64, 16), list(here.manifest.sites)
    for replica in range(2):
        streams = [
            read(opened, order, sites, source.Share(128, 3, 45, replica, 2))  # more than an epoch
            for read, opened in ((source.batches, here), (data.replica_batches, there))
        ]
        for one, other in zip(*streams, strict=True):
            assert all(torch.equal(one[site], other[site]) for site in sites)
    serving.stop()


@pytest.mark.slow
def test_a_server_that_is_killed_serves_again_at_its_address(cluster, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make(tmp_path / "x", [9])
    serving = serve_nodes("CPU", str(tmp_path), None, TERMS, port)
    at_server = HttpSource(url=serving.urls[0], dataset_id="x")
    before = store.open_source(at_server).read(0, 0, 9, list(SITES))
    (actor,) = actors("_Server")
    os.kill(actor.pid, signal.SIGKILL)
    for _ in range(600):
        with suppress(UserError):  # no answer, six times
            after = store.open_source(at_server).read(0, 0, 9, list(SITES))
            break
        time.sleep(0.1)
    assert [other.pid for other in actors("_Server")] != [actor.pid]
    assert all(np.array_equal(after[site], before[site]) for site in SITES)
    serving.stop()


def test_nodes_without_the_resource_are_said(cluster, tmp_path):
    with pytest.raises(UserError, match="--nodes disks: no node of the cluster has this resource"):
        serve_nodes("disks", str(tmp_path), None, TERMS, 0)


def job(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/serve.py", *words]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what is started beside a shell is deaf
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard)


@pytest.mark.slow
def test_the_job_says_where_it_is_or_in_a_line_why_not(tmp_path):
    running = job("--root", str(tmp_path / "new"), "--port", "0")
    said = running.stdout.readline()
    assert said.startswith(f"serving {tmp_path}/new at http://127.0.0.1:")
    port = said.strip().rsplit(":", 1)[1]
    for words, line in [
        (("--port", port), f"--port {port}: cannot listen"),
        (("--token-env", "NO_SUCH_TOKEN"), "--token-env: the environment variable NO_SUCH_TOKEN is not set"),
        (("--nodes", "CPU", "--host", "0.0.0.0"), "--host: 0.0.0.0; with --nodes each actor listens at its node's own"),
        (("--max-rows", "0"), "--max-rows: 0 should be at least 1"),
    ]:
        refused = job("--root", str(tmp_path), *words)
        _, errors = refused.communicate(timeout=120)
        assert refused.returncode == 2
        assert errors.startswith("error: ")
        assert line in errors
        assert len(errors.splitlines()) == 1
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
