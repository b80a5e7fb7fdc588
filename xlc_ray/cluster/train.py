"""Training as a Ray Train job: worker groups of replicas × feature shards, fed by Ray Data, restarted on failure."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import Tensor

from xlc_ray import files
from xlc_ray.activations.store import Store, open_store
from xlc_ray.cluster.cli import find_user_error
from xlc_ray.cluster.data import replica_batches
from xlc_ray.cluster.driver import driving
from xlc_ray.cluster.gauges import Gauges
from xlc_ray.cluster.session import connect, require, resolve
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Shards, Wiring
from xlc_ray.progress import Progress
from xlc_ray.training import Diverged, logs, loop

POLL_SECONDS = 0.3
"""How often the driver looks for new lines of metrics."""


def train(config: Config) -> dict[str, Any]:
    """Train a dictionary on stored activations, or go on from the run directory's newest checkpoint.

    Returns the last metrics, with `out`. Raises UserError where settings, store or cluster do not allow it, Diverged
    where the loss is not finite, and what made a worker fail when `cluster.max_failures` restarts did not help.
    """
    config = resolve(config)
    data = _open(config)
    loop.wiring_for(config, data)  # a store that does not fit is said before anything starts
    connect()
    workers = config.cluster.tensor_parallel * config.cluster.replicas
    require(workers * config.cluster.cpus_per_worker, workers * config.cluster.gpus_per_worker, f"{workers} workers")
    step = loop.prepare(config)
    if step != config.train.steps:
        if config.source.verify:
            data.verify()
        with driving(config.out), _Watch(config, step or 0):
            _fit(config)
    return {**logs.read(config.out)[-1], "out": config.out}


def _open(config: Config) -> Store:
    """The store, made first where it is missing and may be. A store that is there but damaged stays an error."""
    path = config.source.path
    if not any(files.exists(files.join(path, name)) for name in ("manifest.json", "index.bin")):
        if not config.source.make_if_missing:
            raise UserError(
                f"source.path: no complete store at {path}; make it by jobs/generate.py with the same settings, "
                "or set source.make_if_missing: true"
            )
        from xlc_ray.cluster.generate import generate  # with its language-model libraries, which workers do not need

        generate(config)
    return open_store(path)


def _fit(config: Config) -> None:
    """Run worker groups until one reaches the end. Each begins at the newest checkpoint."""
    cluster = config.cluster
    gpus = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpus else {})
    for left in reversed(range(cluster.max_failures + 1)):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config},
            scaling_config=ScalingConfig(  # pyrefly: ignore (two classes share the name)
                num_workers=cluster.tensor_parallel * cluster.replicas, use_gpu=gpus, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(  # pyrefly: ignore (likewise)
                name=files.name(config.out), storage_path=files.join(config.out, "ray_train")
            ),
        )
        try:
            with _interruptible():
                trainer.fit()
            return
        except (TrainingFailedError, RayError) as error:
            if mistake := find_user_error(error):
                raise UserError(str(mistake)) from None
            if not left or "Diverged" in str(error):
                raise
            print(f"train: {_reason(error)}; going on from the last checkpoint ({left} restarts left)", flush=True)


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


def _reason(error: Exception) -> str:
    """One line on why workers failed."""
    failures = list(getattr(error, "worker_failures", {}).values())
    lines = str(failures[0] if failures else error).strip().splitlines()
    return f"a worker failed ({lines[-1].strip()[:200]})"


def _worker(settings: dict[str, Any]) -> None:
    """One rank: what Ray Train calls in every worker."""
    config: Config = settings["config"]
    device = get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))  # Ray allows workers one thread
    torch.manual_seed(config.seed)
    shards = Shards.of_world(config.cluster.tensor_parallel, device.type)
    data = open_store(config.source.path)
    gauges = Gauges(files.name(config.out), rank=ray.train.get_context().get_world_rank())
    leader = shards.rank == 0 and shards.replica == 0

    def reader(wiring: Wiring, first: int) -> Iterator[Mapping[str, Tensor]]:
        train, rows = config.train, loop.order_for(config, data)
        where = shards.replica, shards.replicas
        return replica_batches(data, rows, wiring.sites, train.batch_tokens, first, train.steps, *where)

    def saved(step: int, metrics: dict[str, Any]) -> None:
        # Ray Train hears of checkpoints only: each report waits for the controller's next poll. The checkpoint itself
        # is ours, so that any number of ranks can read it, with or without Ray.
        ray.train.report(metrics | {"step": step})

    loop.train_rank(config, data, shards, reader, device, gauges.set if leader else lambda _: gauges.set({}), saved)


class _Watch:
    """The driver's view of a run: a thread that follows metrics.jsonl and draws the progress line."""

    def __init__(self, config: Config, step: int):
        self.config, self.step = config, step
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _follow(self) -> None:
        train = self.config.train
        with Progress("train", "steps", train.steps, self.step, self.step * train.batch_tokens) as progress:
            while True:
                last = self.stop.wait(POLL_SECONDS)
                self._show(progress)
                if last:
                    return

    def _show(self, progress: Progress) -> None:
        m = logs.last(self.config.out)
        if m and m["step"] > self.step:
            self.step = m["step"]
            values = f"loss {m['loss']:.4g}", f"ev {m['explained_variance']:.3f}", f"l0 {m['l0']:.1f}"
            if "kl" in m:
                values = *values, f"kl {m['kl']:.3f}"
            progress.update(m["step"], m["tokens"], *values, f"dead {m['dead_features']:.1%}")


__all__ = ["Diverged", "train"]
