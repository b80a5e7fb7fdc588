"""driver.json in a run directory: which process drives the run, and how it ended. It is how another terminal, which
shares nothing with the job but the directory, finds the process, its cluster and its logs.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, ValidationError

from xlc_ray import files
from xlc_ray.config import UserError

FILE = "driver.json"


class Driver(BaseModel):
    """What stands in driver.json. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    born: str
    """When the process was started, as its system says: ids of processes are used again."""
    started: float
    command: str
    job: str
    """Ray's id of the job."""
    dashboard: str
    """Address of the cluster's dashboard, which answers for jobs."""
    logs: str
    """Directory of the cluster's logs on that host."""
    output: str | None
    """File that its messages go to; None where they go to a terminal or a pipe."""
    outcome: str | None = None
    """finished, interrupted, failed; None while it runs, or when it was killed."""
    error: str | None = None
    """First line of what made it fail."""
    ended: float | None = None

    def here(self) -> bool:
        """Whether it ran on this host."""
        return self.host == socket.gethostname()

    def alive(self) -> bool | None:
        """Whether the process is there; None if only another host could say."""
        if self.outcome:
            return False
        return _born(self.pid) == self.born if self.here() else None


@contextmanager
def driving(directory: str) -> Iterator[None]:
    """Write that this process drives what lies in a directory, and at the end how that ended. Ray is connected. Raises
    UserError where another process of this host drives it."""
    other = read(directory)
    if other and other.alive() and other.pid != os.getpid():
        raise UserError(
            f"{directory}: process {other.pid} is working on it ({other.command}); wait for it, stop it by "
            "jobs/monitor.py --stop, or choose another --out"
        )
    # The cluster that this process is in; the level stays that of session.connect.
    found: Any = ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
    driver = Driver(
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_born(os.getpid()) or "",
        started=time.time(),
        command=shlex.join(sys.argv),
        job=ray.get_runtime_context().get_job_id(),
        dashboard=f"http://{found.dashboard_url}",
        logs=os.path.join(found.address_info["session_dir"], "logs"),
        output=os.path.realpath("/dev/fd/2") if stat.S_ISREG(os.fstat(2).st_mode) else None,
    )
    _write(directory, driver)
    outcome: dict[str, object] = {"outcome": "finished"}
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        outcome = {"outcome": "interrupted"}
        raise
    except BaseException as error:
        first = str(error).strip().splitlines() or [""]
        outcome = {"outcome": "failed", "error": f"{type(error).__name__}: {first[0][:300]}"}
        raise
    finally:
        _write(directory, driver.model_copy(update=outcome | {"ended": time.time()}))


def read(directory: str) -> Driver | None:
    """The newest driver of a directory, if there was one. Raises UserError where the file is damaged."""
    path = files.join(directory, FILE)
    if not files.exists(path):
        return None
    try:
        return Driver.model_validate(files.read_mapping(path))
    except ValidationError as error:
        raise UserError(f"{path}: not a driver's: {error.errors()[0]['msg']}") from None


def mark(directory: str, outcome: str) -> None:
    """Write how a driver ended that could not do so itself."""
    found = read(directory)
    if found and found.outcome is None:
        _write(directory, found.model_copy(update={"outcome": outcome, "ended": time.time()}))


def _write(directory: str, driver: Driver) -> None:
    files.write_json(files.join(directory, FILE), driver.model_dump())


def _born(pid: int) -> str | None:
    """The time at which a process of this host was started, in its system's words; None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
