"""Jobs from another terminal: what a cluster runs, what a run printed, and how it is stopped.

The dashboard's address, the process and the logs stand in the run's driver.json, so that nothing has to be guessed
where several clusters share a machine.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from xlc_ray import files
from xlc_ray.cluster import driver
from xlc_ray.cluster.driver import Driver
from xlc_ray.cluster.runs import Run
from xlc_ray.cluster.trial import TRIALS
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.progress import duration
from xlc_ray.training.saving import REQUEST

CONNECT_SECONDS = 2.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.3
COMMAND_WIDTH = 60
SUBMITTED = "SUBMISSION"
MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Beginnings of the lines by which Ray tells whose output follows."""


def client(address: str) -> JobSubmissionClient | None:
    """The jobs of the cluster whose dashboard is at an address; None where nobody answers. Raises UserError where one
    needs a token."""
    url = urlsplit(address)
    try:
        with closing(socket.create_connection((url.hostname or "", url.port or 80), CONNECT_SECONDS)):
            pass
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"{address}: wants a token; export RAY_AUTH_MODE=token first") from None
    except (OSError, RuntimeError):  # ConnectionError too; RuntimeError: whoever answers there is no dashboard
        return None


def job_lines(jobs: JobSubmissionClient, most: int) -> list[str]:
    """A line a job, the newest first: its id, state, time since it began, command."""
    try:
        every: list[Any] = jobs.list_jobs()
    except (OSError, RuntimeError) as error:  # the head ended since it was asked last
        return [f"no answer: {str(error).splitlines()[0]}"]
    newest = sorted(every, key=lambda job: (job.start_time or 0, job.job_id or ""), reverse=True)
    lines = []
    for job in newest[:most]:
        end = (job.end_time or 1000 * time.time()) if job.start_time else 0
        took = duration((end - (job.start_time or 0)) / 1000) if end else ""
        name = job.submission_id or job.job_id or ""
        program, _, words = job.entrypoint.partition(" ")
        command = f"{os.path.basename(program)} {words}"
        shown = command if len(command) <= COMMAND_WIDTH else f"{command[: COMMAND_WIDTH - 1]}…"
        lines.append(f"{name:<24}  {job.status.value.lower():<10}{took:>9}  {shown}")
    return lines or ["none"]


def stop(run: Run) -> str:
    """End a run as Ctrl-C would: it is interrupted, and its checkpoints stay; ask a trial to leave its sweep. Returns a
    line. Raises UserError."""
    found = run.driver
    if run.over or found is None:
        raise UserError(f"{run.name}: nobody to stop: it is {run.state}")
    if run.trial and driver.read(run.path) is None:
        files.write_bytes(files.join(run.path, REQUEST), b"")
        return f"{run.name}: is asked to stop: it ends at its next checkpoint, and its sweep goes on without it"
    jobs = client(found.dashboard)
    job = _submitted(jobs, found) if jobs else None
    if jobs and job and job.submission_id:
        jobs.stop_job(job.submission_id)
        how, ended = f"Ray job {job.submission_id}", lambda: _over(jobs, str(job.submission_id))
    elif found.alive():
        os.kill(found.pid, signal.SIGINT)
        how, ended = f"process {found.pid}", lambda: not found.alive()
    else:
        raise UserError(f"{run.name}: is driven by process {found.pid} of {found.host}; stop it there")
    if not _wait(ended):
        raise UserError(f"{run.name}: {how} was asked to stop and still runs after {STOP_SECONDS:g} s")
    driver.mark(run.path, "interrupted")
    steps = checkpoint.steps(run.path)
    kept = f"goes on from step {steps[-1]:,}" if steps else "has no checkpoint, and starts anew"
    return f"{run.name}: stopped ({how}); the same command {kept}"


def _submitted(jobs: JobSubmissionClient, found: Driver) -> Any:
    """The submitted job that a driver belongs to, if it was submitted. Ids of jobs are used again by later clusters."""
    every: list[Any] = jobs.list_jobs()
    for job in every:
        if job.type == SUBMITTED and job.job_id == found.job and job.driver_info:
            return job if job.driver_info.pid == str(found.pid) else None
    return None


def _over(jobs: JobSubmissionClient, submission: str) -> bool:
    return jobs.get_job_status(submission).is_terminal()


def _wait(ended: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if ended():
            return True
        time.sleep(POLL_SECONDS)
    return False


def log_lines(run: Run, follow: Callable[[], bool]) -> Iterator[str]:
    """What the driver printed, if it went to a file, and the workers of its job; with `follow()`, what comes, too. Of a
    trial: what workers printed while they worked on it.

    A header `==> file <==` stands where the next lines are another file's. Raises UserError where they lie elsewhere.
    """
    found = run.driver
    if found is None:
        raise UserError(f"{run.name}: has no {driver.FILE}, so nobody knows where its logs are")
    if not (found.here() and os.path.isdir(found.logs)):
        yield from _remote_lines(run.name, found)
        return
    seen: dict[Path, int] = {}
    of_trial: dict[Path, bool] = {}
    header = None
    while True:
        last = not follow()
        for path in _log_files(found):
            lines = _new_lines(path, seen)
            if run.trial:
                lines = list(_of_trial(files.name(run.path), lines, path, of_trial))
            if lines:
                if path != header:
                    yield f"==> {path} <=="
                header = path
                yield from lines
        if last:
            return
        time.sleep(POLL_SECONDS)


def _log_files(found: Driver) -> list[Path]:
    output = [Path(found.output)] if found.output else []
    logs = Path(found.logs)
    workers = sorted(logs.glob(f"worker-*-{found.job}-*.*"), key=lambda path: path.stat().st_mtime)
    return [path for path in [*output, *workers] if path.is_file()]


def _of_trial(name: str, lines: list[str], path: Path, inside: dict[Path, bool]) -> Iterator[str]:
    """Lines of a worker's output from where it says that it works on the trial to where on others. `inside`: whether
    the lines before these ended there."""
    for line in lines:
        if line.startswith(TRIALS):
            inside[path] = name in line.split()[1:]
        elif inside.get(path):
            yield line


def _new_lines(path: Path, seen: dict[Path, int]) -> list[str]:
    """Whole lines that were added since the last look, without Ray's marks."""
    with path.open("rb") as file:
        file.seek(seen.get(path, 0))
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    seen[path] = seen.get(path, 0) + len(whole)
    return [line for line in whole.decode(errors="replace").splitlines() if not line.startswith(MARKS)]


def _remote_lines(name: str, found: Driver) -> Iterator[str]:
    jobs = client(found.dashboard)
    job = _submitted(jobs, found) if jobs else None
    if not (jobs and job and job.submission_id):
        raise UserError(f"{name}: its logs are on {found.host}, in {found.logs}")
    yield from jobs.get_job_logs(job.submission_id).splitlines()
