"""A real Ray cluster of several nodes on this machine, and jobs on it, watched from outside: for fault tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.cluster.actors import actors
from xlc_ray.config import Config
from xlc_ray.config.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds after which what should happen has not."""


def wait_for(what: str, happened: Callable[[], object], job: Job | None = None, pause: float = 0.01) -> None:
    """Until `happened()`. Raises where it does not, or where the job ends first."""
    until = time.monotonic() + PATIENCE
    while not happened():
        if job is not None and job.process.poll() is not None:
            raise RuntimeError(f"the job ended before {what}:\n{job.output()}")
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {PATIENCE:.0f} s\n{job.output() if job else ''}")
        time.sleep(pause)


class Nodes:
    """A head without CPUs, and nodes of one CPU each, which is room for one worker of 0.6."""

    def __init__(self, count: int, **of_head: object) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray")  # the paths of sockets must be short
        # RAY_TMPDIR: else other processes of this machine find this cluster, and take it for theirs.
        os.mkdir(f"{self.folder}/ray")
        os.environ |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "RAY_TMPDIR": self.folder}
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "temp_dir": self.folder} | of_head
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, log_to_driver=False)
        self.others, self.jobs = [], []
        try:
            self.fill(count)
        except BaseException:
            self.close()
            raise

    def add(self):
        """One more node."""
        return self.cluster.add_node(num_cpus=1)

    def fill(self, count: int) -> None:
        """Nodes until there are so many."""
        while len(self.others) < count:
            self.others.append(self.add())

    def kill(self, node_id: str) -> None:
        """End all processes of a node at once."""
        (node,) = [node for node in self.others if node.node_id == node_id]
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def end_jobs(self) -> None:
        """End the drivers that still live."""
        for job in self.jobs:
            job.kill()
        self.jobs = []

    def close(self) -> None:
        """The end of all jobs and nodes."""
        self.end_jobs()
        ray.shutdown()
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)  # Ray's last processes may still write there


def steps_in(run: Path) -> list[int]:
    """Steps of a run in the order in which they were made."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def workers() -> list:
    """Training workers that live."""
    return actors("RayTrainWorker")


class Job:
    """A job as a user starts it, in a process of its own."""

    def __init__(self, name: str, config: Config | SweepConfig, nodes: Nodes) -> None:
        self.config, self.out = config, Path(config.out)
        self.log = Path(tempfile.mkstemp(prefix=name, dir=nodes.folder)[1])
        settings = self.log.with_suffix(".yaml")
        settings.write_text(config.yaml())
        environment = os.environ | {"RAY_ADDRESS": nodes.cluster.address}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, f"jobs/{name}.py", "--config", str(settings)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        nodes.jobs.append(self)

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def finish(self) -> int:
        """Its exit status."""
        return self.process.wait(timeout=PATIENCE)

    def kill(self) -> None:
        """End the driver at once, where it has not ended."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def steps(self) -> list[int]:
        """Steps in the order in which they were made; a step that was made again stands there again."""
        return steps_in(self.out)

    def at_step(self, step: int) -> None:
        """Wait until it was made."""
        wait_for(f"step {step}", lambda: self.steps()[-1:] >= [step], self)

    def goes_on(self, made: int) -> float:
        """Wait until a step follows on the first `made` lines of metrics. Returns the time."""
        wait_for("a step after the failure", lambda: len(self.steps()) > made, self)
        return time.monotonic()
