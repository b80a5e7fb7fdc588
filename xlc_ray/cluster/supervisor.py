"""Worker groups, one after another, until one reaches the last step: what makes a run outlive its machines.

A group ends because it is done, because something failed, or, at a checkpoint, because nodes came back and a larger
layout has room again. The next one takes the best layout that the nodes have room for now (placement.py) and begins at
the newest checkpoint, which any layout reads. Batches are addressed globally, so the layout changes neither the rows of
a step nor their order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig  # ray.train's, with their own types

from xlc_ray import files
from xlc_ray.cluster import watchdog
from xlc_ray.cluster.cli import find_user_error
from xlc_ray.cluster.network import Torch
from xlc_ray.cluster.placement import Place, best, layouts, least_models, nodes_now
from xlc_ray.cluster.session import storage
from xlc_ray.config import Config, Unreachable, UserError
from xlc_ray.dictionary import checkpoint

GROWN = "grown"
"""What a worker returns that ended for a larger layout."""
SETTLE_SECONDS = 15.0
"""How long what nodes have in all may still be held by a group, or another stage, that is ending."""
START_SECONDS = "30"
"""For Ray Train's placement group: we ask only for room that is there, so that it is lost if it takes longer."""

Worker = Callable[[dict[str, Any]], Any]


def supervise(config: Config, worker: Worker, generators: Any = None) -> None:
    """Run groups of `worker({config, place, attempt, generators})` until one reaches the end.

    Raises UserError for a mistake that a worker found, where no room comes up within `cluster.node_wait_s`, or where
    the run directory is gone; and what made a worker fail after `cluster.max_failures` restarts in a row that brought
    no new checkpoint.
    """
    left, newest = config.cluster.max_failures, _newest(config)
    while True:
        if generators is not None:
            ray.get(generators.rest.remote())  # language models take the room that workers leave, not theirs
        place = _room(config)
        attempt = time.strftime("%Y%m%dT%H%M%S")
        try:
            with _interruptible():
                result: Any = _trainer(config, worker, place, attempt, generators).fit()
            if result.return_value != GROWN:
                return
            print(f"train: nodes are back; {_onward(_newest(config))}", flush=True)
        except (TrainingFailedError, RayError) as error:
            mistake = find_user_error(error)
            if mistake and not isinstance(mistake, Unreachable):
                raise type(mistake)(str(mistake)) from None
            reason = str(mistake) if mistake else _reason(config, attempt, error)
            found = _newest(config)
            left, newest = (config.cluster.max_failures if found > newest else left), found
            if not left:
                print(f"train: {reason}; what is complete is in {config.out}", flush=True)
                raise
            left -= 1
            print(f"train: {reason}; {_onward(found)} ({left} restarts left)", flush=True)


def _newest(config: Config) -> int:
    """The step of the newest checkpoint, or 0, once the file system tells. Says which are passed over as damaged.
    Raises UserError where the run directory, which was there, is gone."""

    def seen() -> int:
        if not files.exists(files.join(config.out, "config.yaml")):
            raise FileNotFoundError(config.out)
        complete, damaged = checkpoint.look(config.out)
        for line in damaged:
            print(f"train: {line}", flush=True)
        return (complete or [0])[-1]

    try:
        return files.waiting(config.cluster.read_retry_s, seen)
    except FileNotFoundError:
        raise UserError(
            f"{config.out}: the run directory is gone (looked for {config.cluster.read_retry_s:g} s)"
        ) from None


def _onward(step: int) -> str:
    return f"going on from step {step:,}" if step else "starting again"


def _room(config: Config) -> Place:
    """The best place that the nodes have room for, as soon as they have."""
    wanted, models = layouts(config)[0], least_models(config)
    started, told = time.monotonic(), False
    while True:
        most, now = (best(config, nodes_now(free), models) for free in (False, True))
        waited = time.monotonic() - started
        if now and (now.layout == wanted or waited > SETTLE_SECONDS or (most and now.layout == most.layout)):
            if now.layout != wanted:
                print(f"train: room for {now.layout}, not for the {wanted} wanted", flush=True)
            return now
        if waited > max(SETTLE_SECONDS, config.cluster.node_wait_s):
            raise UserError(
                f"cluster: no room for {wanted} of {config.cluster.cpus_per_worker:g} CPUs and "
                f"{config.cluster.gpus_per_worker:g} GPUs{' beside a language model' * models} for {waited:.0f} s "
                "(cluster.node_wait_s); what was complete is kept: add nodes, or lower cluster.min_replicas"
            )
        if not told and waited > SETTLE_SECONDS:
            print(f"train: waiting for nodes, {config.cluster.node_wait_s:.0f} s at most", flush=True)
            told = True
        time.sleep(0.5)


def _trainer(config: Config, worker: Worker, place: Place, attempt: str, generators: Any) -> TorchTrainer:
    cluster = config.cluster
    gpus = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpus else {})
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_SECONDS)
    patience = max(cluster.hang_timeout_s, watchdog.START)
    # A process that was stopped says nothing of itself. Those that wait for it go first, so that their stacks are told.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.hang_timeout_s + 2 * watchdog.GRACE)
    return TorchTrainer(
        worker,
        train_loop_config={"config": config, "place": place, "attempt": attempt, "generators": generators},
        scaling_config=ScalingConfig(
            num_workers=place.layout.workers,
            use_gpu=gpus,
            resources_per_worker=resources,
            label_selector=[{"ray.io/node-id": node} for node in place.nodes],
        ),
        torch_config=Torch(backend="nccl" if gpus else "gloo", timeout_s=int(patience + 12 * watchdog.GRACE)),
        run_config=RunConfig(
            name=files.name(config.out),
            **storage(files.join(config.out, "ray_train")),
            # Whatever Ray Train would try again by itself, it would try on the same nodes.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt: Ray Train takes the signal over, stops its workers and exits the process."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _reason(config: Config, attempt: str, error: Exception) -> str:
    """Why workers failed: that they hung, and where, or one line of the first's exception."""
    stacks = files.join(config.out, "stacks", attempt)
    if hung := files.waiting(config.cluster.read_retry_s, lambda: watchdog.first_lines(stacks)):
        return f"no step for cluster.hang_timeout_s: {'; '.join(hung)}; all stacks in {stacks}"
    failures = list(getattr(error, "worker_failures", {}).values())
    lines = str(failures[0] if failures else error).strip().splitlines()
    return f"a worker failed ({lines[-1].strip()[:200]})"
