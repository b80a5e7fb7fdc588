"""Another terminal, which shares nothing with a run but its directory: it sees it, reads its logs and stops it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from ray.job_submission import JobSubmissionClient

from tests.cluster.conftest import ROOT
from tests.cluster.endpoint import scraped
from tests.runs import small_run_in
from xlc_ray.cluster import control, driver, monitor, runs
from xlc_ray.dictionary import checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def long_run(tmp_path):
    """long_run(name) → words of a training job without end, on two ranks."""
    settings = small_run_in(tmp_path)

    def words(name):
        config = settings(
            {
                "out": str(tmp_path / "runs" / name),
                "train.steps": 1_000_000,
                "train.log_every": 5,
                "train.checkpoint_every": 5,
                "cluster.tensor_parallel": 2,
            }
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(config.yaml())
        return ["jobs/train.py", "--config", str(file)]

    return words


def row(shelf, name):
    return runs.pick(runs.find(str(shelf)), name)


def until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "in time"
        time.sleep(0.3)


def test_a_plain_run_is_seen_followed_and_interrupted(head, long_run, tmp_path):
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": head.address, "PYTHONPATH": ROOT}
    shelf = tmp_path / "runs"
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen([sys.executable, *long_run("plain")], cwd=ROOT, env=env, stderr=printed)
    until(lambda: shelf.exists() and runs.find(str(shelf)) and row(shelf, "plain").state == "running")
    until(lambda: len(checkpoint.steps(str(shelf / "plain"))) > 0)
    until(lambda: {("memory_bytes", "0"), ("memory_bytes", "1")} <= scraped(head.metrics_port, "plain").keys())

    table = monitor.report(str(shelf))
    assert f"jobs of {head.dashboard}" in table
    assert "python jobs/train.py --config" in table.split("jobs of")[1]
    until(lambda: "train " in (tmp_path / "printed").read_text())
    lines = list(control.log_lines(row(shelf, "plain"), lambda: False))
    assert lines[0] == f"==> {tmp_path / 'printed'} <=="
    assert any(line.startswith("train ") for line in lines)

    terminal = [sys.executable, "-m", "xlc_ray.cluster.monitor", str(shelf), "--stop", "plain"]
    done = subprocess.run(terminal, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    kept = checkpoint.steps(str(shelf / "plain"))[-1]
    assert done.stdout == f"plain: stopped (process {process.pid}); the same command goes on from step {kept:,}\n"
    assert process.wait(timeout=60) == 130
    assert "INFO" not in (tmp_path / "printed").read_text()  # Ray's remarks stay in its logs
    assert row(shelf, "plain").state == driver.read(str(shelf / "plain")).outcome == "interrupted"


def test_a_submitted_run_is_stopped_by_its_cluster(head, long_run, tmp_path):
    jobs, shelf = JobSubmissionClient(head.dashboard), tmp_path / "runs"
    env = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": ROOT}
    command = f"cd {ROOT} && {sys.executable} {' '.join(long_run('submitted'))}"
    submission = jobs.submit_job(entrypoint=command, runtime_env={"env_vars": env})
    until(lambda: shelf.exists() and runs.find(str(shelf)) and row(shelf, "submitted").state == "running")
    until(lambda: len(checkpoint.steps(str(shelf / "submitted"))) > 0)
    until(lambda: "train " in jobs.get_job_logs(submission))
    lines = list(control.log_lines(row(shelf, "submitted"), lambda: False))
    assert lines[0].endswith(f"job-driver-{submission}.log <==")
    assert submission in monitor.report(str(shelf))

    line = control.stop(row(shelf, "submitted"))
    kept = checkpoint.steps(str(shelf / "submitted"))[-1]
    assert line == f"submitted: stopped (Ray job {submission}); the same command goes on from step {kept:,}"
    assert jobs.get_job_status(submission) == "STOPPED"
    assert row(shelf, "submitted").state == "interrupted"
