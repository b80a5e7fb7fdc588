"""Comparison of two runs as a job: one Ray task finds each feature's nearest in the other run."""

from __future__ import annotations

from typing import Any

import ray
import torch

from xlc_ray import evaluation, files
from xlc_ray.cluster.evaluate import check_changes
from xlc_ray.cluster.placement import require_model
from xlc_ray.cluster.session import connect, run_path
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary.checkpoint import load_dictionary, settings

FILE = "compare.json"


def compare(run_dir: str, against: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Mean max cosine similarity of the decoders of two runs, both ways. `changes`: overrides of the first's settings.

    Writes `compare.json` to the first run's directory and returns its content: see evaluation/compare.py. Raises
    UserError where a checkpoint is missing or the runs do not write the same sites.
    """
    if not against:
        raise UserError("--against: missing; give --against DIR, the directory of another run")
    check_changes(changes)
    connect()
    run_dir, against = run_path(run_dir), run_path(against)
    config = settings(run_dir).override(changes or {})
    cluster = config.cluster
    require_model(cluster, "comparison")
    task = ray.remote(_compare).options(num_cpus=cluster.cpus_per_model, num_gpus=cluster.gpus_per_model)
    return ray.get(task.remote(run_dir, against, config))


def _compare(run_dir: str, against: str, config: Config) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_model)))
    device = "cuda" if config.cluster.gpus_per_model else "cpu"
    both = (load_dictionary(path)[0].to(device) for path in (run_dir, against))
    found = {"run": run_dir, "against": against, **evaluation.compare(*both)}
    files.write_json(files.join(run_dir, FILE), found)
    return found
