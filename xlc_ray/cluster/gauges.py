"""A run's metrics as Ray metrics: `ray_xlc_<name>{run="…", trial="…", …}` on the metrics endpoint.

The table METRICS is all there is: what training measures finds its place in it, and the Grafana dashboard is drawn from
it, so that the two cannot differ. Metrics that come in families carry the member as a label: `l0/group_3` of
metrics.jsonl is `ray_xlc_group_l0{group="3"}`, a term of the loss is `ray_xlc_loss_term{term="auxk"}`.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util.metrics import Gauge

PREFIX = "xlc_"
"""Ours start with this; Ray puts `ray_` before it."""
LABELS = ("run", "trial", "job_id")
"""What every metric carries: the run directory's last name, the trial of a sweep or "", Ray's id of the job
(`job` alone is Prometheus's own)."""


@dataclass(frozen=True)
class Metric:
    """One metric of a run: its name in metrics.jsonl and, after `ray_xlc_`, on the endpoint."""

    name: str
    about: str
    room: str
    """The part of the dashboard that shows it."""
    unit: str = "short"
    """Grafana's name of the unit."""
    label: str | None = None
    """What tells the members of a family apart."""


METRICS = (
    Metric("loss", "What is minimised", "Quality"),
    Metric("explained_variance", "Explained variance of the batch, all written sites", "Quality", "percentunit"),
    Metric("l0", "Active features a token, all groups", "Quality"),
    Metric("dead_features", "Features silent for train.dead_after_tokens", "Quality", "percentunit"),
    Metric("held_out", "On held-out tokens, at the rungs of a sweep", "Quality", label="metric"),
    Metric("loss_term", "Terms of the loss, before their weights", "Terms", label="term"),
    Metric("group_l0", "Active features a token, by group", "Terms", label="group"),
    Metric("step", "Steps done", "Speed"),
    Metric("tokens", "Tokens trained on", "Speed"),
    Metric("tokens_per_s", "Tokens a second", "Speed"),
    Metric("step_s", "Time of a step", "Speed", "s"),
    Metric("data_wait", "Share of the time spent waiting for data", "Speed", "percentunit"),
    Metric("memory_bytes", "Resident memory of each rank", "Memory", "bytes", label="rank"),
    Metric("gpu_memory_bytes", "Largest memory of each rank's GPU so far", "Memory", "bytes", label="rank"),
    Metric("lr", "Learning rate", "Optimizer"),
    Metric("grad_norm", "Norm of the gradient before clipping", "Optimizer"),
    Metric("resampled", "Features started anew by the last resampling", "Optimizer"),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


class Gauges:
    """One rank's gauges. The leader sets a run's metrics; every rank its own memory."""

    def __init__(self, run: str, trial: str = "", rank: int = 0) -> None:
        self._tags = {"run": run, "trial": trial, "job_id": ray.get_runtime_context().get_job_id()}
        self._rank = str(rank)
        self._gauges: dict[str, Gauge] = {}

    def set(self, metrics: Mapping[str, float]) -> None:
        """Publish the newest values, by their names in metrics.jsonl, and this rank's memory."""
        for name, value in metrics.items():
            self._set(*_place(name), value)
        self._set("memory_bytes", self._rank, resident_bytes())
        if torch.cuda.is_initialized():
            self._set("gpu_memory_bytes", self._rank, torch.cuda.max_memory_allocated())

    def _set(self, name: str, member: str, value: float) -> None:
        metric = _BY_NAME[name]
        if name not in self._gauges:
            keys = LABELS if metric.label is None else (*LABELS, metric.label)
            self._gauges[name] = Gauge(PREFIX + name, description=metric.about, tag_keys=keys)
        tags = self._tags if metric.label is None else self._tags | {metric.label: member}
        self._gauges[name].set(float(value), tags=tags)


def _place(name: str) -> tuple[str, str]:
    """The metric that a name of metrics.jsonl belongs to, and the member of its family."""
    if name.startswith("l0/"):
        return "group_l0", name.removeprefix("l0/group_")
    if name.startswith("held_out/"):
        return "held_out", name.removeprefix("held_out/")
    return (name, "") if name in _BY_NAME else ("loss_term", name)


def resident_bytes() -> int:
    """Memory of this process now; at its largest where the system has no /proc."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
