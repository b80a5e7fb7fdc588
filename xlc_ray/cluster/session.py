"""Joining or starting a Ray cluster, and where its jobs put their files."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray._private.utils import read_ray_address  # where ray.init() looks, too
from ray.exceptions import AuthenticationError

from xlc_ray import files
from xlc_ray.config import Config, UserError
from xlc_ray.config.sources import HttpSource, LiveSource, StoreSource

QUIET = ("Progress bars disabled", "Exception occurred in", "An exception was raised from a task", "Full stack trace")
"""Beginnings of Ray Data's lines that a user need not see: the first is what we asked for, the others go with an
exception that we report ourselves."""
AUTHENTICATION = ("", "disabled", "token")
"""What RAY_AUTH_MODE may be; unset, Ray takes tokens where it finds one."""
JOB_FILES = "runtime_resources"
"""Ray unpacks a job's working directory below a folder of this name, and deletes it after the job."""


def connect() -> None:
    """Join the cluster that `ray start`, RAY_ADDRESS or `ray job submit` names, else start one here; once a process.

    Workers' output stays in Ray's logs: what a user should see is said by the driver. The dashboard stays on: without
    it Ray Train leaks its placement groups.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode not in AUTHENTICATION:
        raise UserError(f"RAY_AUTH_MODE: {mode!r} is unknown; allowed: {', '.join(filter(None, AUTHENTICATION))}")
    _quieten()
    if ray.is_initialized():
        return
    _check_address()
    # Ray Train collects reports once a health check: 2 s by default, too slow for short runs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's page of training runs
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ core warns on the console of every pool of actors that may restart, as ours should …
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with _hushed():  # … and remarks on being told not to.
            ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=True)
    except (ConnectionError, AuthenticationError) as error:
        raise UserError(
            f"cluster: cannot be joined: {str(error).strip().splitlines()[0]} (RAY_ADDRESS = "
            f"{os.environ.get('RAY_ADDRESS', 'not set')}, RAY_AUTH_MODE = {mode or 'not set'}); give the address, the "
            "RAY_AUTH_MODE and the token of the running cluster"
        ) from None


def _check_address() -> None:
    """Raise UserError where no cluster answers at the address that Ray would take. Ray itself waits for minutes."""
    given = os.environ.get("RAY_ADDRESS")
    address = given or read_ray_address() or ""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address:  # a cluster of its own; through Ray's client, which says itself who is missing
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        known_by = "RAY_ADDRESS" if given else "the last `ray start` on this machine"
        raise UserError(
            f"cluster: {address} (by {known_by}) cannot be joined: {error}; start it again, or set "
            "RAY_ADDRESS=local to use this machine alone"
        ) from None


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what this process writes to stderr, C++ included, from the console; show it if there is an exception."""
    sys.stderr.flush()
    console = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(console, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(console, 2)
            os.close(console)


def _quieten() -> None:
    """No banners and progress bars of Ray Data on the console; its warnings stay, and its log files are whole."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(QUIET)


def require(cpus: float, gpus: float, what: str) -> None:
    """Check that the cluster can hold what a stage needs at once, because Ray would wait for it in silence.

    Raises UserError with what there is.
    """
    have = ray.cluster_resources()
    for kind, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(kind, 0.0) + 1e-9:
            raise UserError(
                f"cluster: {what} needs {need:g} {kind}s at once, the cluster has {have.get(kind, 0.0):g}; "
                "lower the settings under cluster, or add nodes"
            )


def available(kind: str) -> float:
    """CPUs or GPUs of the cluster that nobody holds now."""
    return ray.available_resources().get(kind, 0.0)


def log_directory() -> str | None:
    """Where Ray on this node keeps the logs of the session that this process has joined; None where it joined none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return os.path.join(context.get_temp_dir(), context.get_session_name(), "logs")


def resolve(config: Config) -> Config:
    """The same settings with absolute local paths, because workers run in other directories; URLs stay as they are.

    `model.name`, `base_model.name` and the datasets of `text` are seen from the working directory and left alone where
    nothing is there (a name on the Hub). `out` and `source.path` are relative to $XLC_ROOT; without it to the working
    directory, or, in a Ray job that runs in a temporary copy of it, to ~/xlc_ray. So is `source.cache.path`.
    """
    changes = {"model.name": _absolute(config.model.name), **config.text.renamed(_absolute)}
    if config.base_model:
        changes["base_model.name"] = _absolute(config.base_model.name)
    places = {"out": config.out}
    match config.source:
        case StoreSource(path=path, cache=cache):
            places["source.path"] = path
            if cache:
                places["source.cache.path"] = cache.path
        case LiveSource(path=path, tee=tee):
            places |= {"source.path": path} | ({"source.tee": tee} if tee else {})
        case HttpSource():
            pass
    changes |= {path: output_path(name) for path, name in places.items()}
    if config.train.loss.connection:
        changes["train.loss.connection.run"] = run_path(config.train.loss.connection.run)
    resolved = config.override(changes)
    if "XLC_ROOT" not in os.environ and _in_job_copy(Path.cwd()) and not _all_absolute(config):
        print(f"job runs in a temporary copy: out is {resolved.out}, source.path is {resolved.source.path}", flush=True)
    return resolved


def run_path(run_dir: str) -> str:
    """An existing run directory, absolute: seen from the working directory, else from where jobs put relative ones."""
    if files.is_url(run_dir):
        return run_dir
    path = Path(files.local(run_dir))
    return str(path.absolute()) if path.exists() else output_path(run_dir)


def output_path(out: str) -> str:
    """Where a job puts what it makes: a URL as it is, a local path, of `file://` too, absolute from `output_root`."""
    return out if files.is_url(out) else str(output_root() / Path(files.local(out)))


def output_root() -> Path:
    """Absolute directory that relative `out` and `source.path` start from."""
    if root := os.environ.get("XLC_ROOT"):
        return Path(root).expanduser().absolute()
    return Path.home() / "xlc_ray" if _in_job_copy(Path.cwd()) else Path.cwd()


def _in_job_copy(directory: Path) -> bool:
    return JOB_FILES in directory.parts


def _all_absolute(config: Config) -> bool:
    return all("://" in p or Path(p).expanduser().is_absolute() for p in (config.out, config.source.path))


def _absolute(name: str) -> str:
    return os.path.abspath(files.local(name)) if _exists_here(name) else name


def _exists_here(name: str) -> bool:
    """Whether a local file or directory has this name, or, for a glob, whether its directory exists."""
    if files.is_url(name):
        return False
    path = Path(files.local(name))
    fixed = path
    while any(c in str(fixed) for c in "*?["):
        fixed = fixed.parent
    return path.exists() or (fixed != path and fixed.exists())


def storage(path: str) -> dict[str, Any]:
    """Settings of Ray Train or Tune: where it keeps its state, by the file system that all else there goes
    through: Arrow knows few URLs."""
    if not files.is_url(path):
        return {"storage_path": files.local(path)}
    fs, inner = files.filesystem(path)
    return {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
