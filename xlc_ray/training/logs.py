"""Where a run's metrics go: metrics.jsonl (appended), the console, and wandb if asked; and the rates among them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from xlc_ray import files
from xlc_ray.config import Config, UserError

FILE = "metrics.jsonl"
TAIL_BYTES = 2**18
"""More than the longest line: a thousand groups take 30 kB."""


@dataclass
class Clock:
    """Tokens per second, time of a step, and the share of time spent waiting for data, since the last look."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    tokens: int = 0
    steps: int = 0

    def read(self) -> dict[str, float]:
        """Rates since the last call."""
        now = time.perf_counter()
        passed = max(now - self.started, 1e-9)
        rates = {
            "tokens_per_s": self.tokens / passed,
            "step_s": passed / max(self.steps, 1),
            "data_wait": self.waited / passed,
        }
        self.started, self.waited, self.tokens, self.steps = now, 0.0, 0, 0
        return rates


class Log:
    """The metrics of one run, written by one rank."""

    def __init__(self, config: Config):
        self.path = files.join(config.out, FILE)
        if files.exists(self.path) and files.tail(self.path, 1) != b"\n":  # a disk was full in the middle of a line
            files.append(self.path, "\n")
        self.run = _start_wandb(config) if config.train.wandb else None

    def write(self, metrics: dict[str, Any]) -> None:
        """One line of metrics."""
        files.append(self.path, json.dumps(metrics) + "\n")
        if self.run:
            self.run.log(metrics, step=metrics["step"])

    def close(self) -> None:
        """Finish the wandb run."""
        if self.run:
            self.run.finish()


def read(run_dir: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order of steps. Where a resumed run passed a step again, the later line counts."""
    path = files.join(run_dir, FILE)
    if not files.exists(path):
        return []
    lines: list[dict[str, Any]] = []
    for line in _whole(files.read_bytes(path).split(b"\n")):
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def last(run_dir: str) -> dict[str, Any] | None:
    """The newest line, which costs the same however long the run is. A line that is being written does not count."""
    path = files.join(run_dir, FILE)
    if not files.exists(path):
        return None
    return next(_whole(reversed(files.tail(path, TAIL_BYTES).split(b"\n")[:-1])), None)


def _whole(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Those of the lines that were written to their end."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _start_wandb(config: Config):
    settings = config.train.wandb
    assert settings is not None
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.wandb: the package wandb is missing; pip install -e '.[wandb]' or set it to null"
        ) from None
    directory = "." if files.is_url(config.out) else files.local(config.out)
    run = f"{config.out}-{config.seed}"  # whole: last names are the same in many directories and sweeps
    try:
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=directory,
            name=files.name(config.out),
            group=settings.group,
            id=hashlib.sha256(run.encode()).hexdigest()[:16],
            resume="allow",
            reinit="create_new",  # several runs may share a process
            config=config.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"train.wandb: {said}; wandb login, or set train.wandb.mode: offline") from None
