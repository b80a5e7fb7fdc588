"""One small Ray cluster for all tests here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.prepared import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """Where a cluster of its own answers."""

    dashboard: str
    address: str
    metrics_port: int
    root: Path
    """$XLC_ROOT of its jobs."""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """`ray start` in a process group of its own. Not ended by `ray stop`, which ends every Ray of the machine, this
    process's too. Jobs have its environment."""
    root = tmp_path_factory.mktemp("root")
    port, dashboard, client, metrics, agent = _free_ports(5)
    url, sockets = f"http://127.0.0.1:{dashboard}", tempfile.mkdtemp(prefix="ray")  # a socket's path must be short
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    ports += [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"]  # without it, no jobs
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={sockets}", *ports],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "XLC_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    for _ in range(120):
        assert process.poll() is None, process.communicate()[0]
        with suppress(OSError), urllib.request.urlopen(f"{url}/api/version"):
            break
        time.sleep(1)
    yield Head(url, f"127.0.0.1:{port}", metrics, root)
    process.terminate()  # `--block` ends what it started
    process.communicate(timeout=60)
    shutil.rmtree(sockets, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def cluster():
    """Four logical CPUs. The dashboard is on, as in jobs: Ray Train cleans up through it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def asset():
    """Absolute path of something that ships with the project."""
    return lambda name: os.path.join(ROOT, "configs/assets", name)


@pytest.fixture(scope="session")
def tiny_config():
    """Settings of a quick generation with the smallest model: tiny_config(directory, {dotted override: value})."""
    return tiny
