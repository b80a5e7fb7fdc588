"""Evaluation as a job: one Ray task measures a run on held-out tokens and writes what it found beside it."""

from __future__ import annotations

from typing import Any

import ray
import torch

from xlc_ray import evaluation, files
from xlc_ray.activations.store import open_store
from xlc_ray.cluster.session import connect, require, run_path
from xlc_ray.config import Config
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.evaluation import core
from xlc_ray.evaluation.features import write_features
from xlc_ray.evaluation.report import write_report
from xlc_ray.training import logs


def evaluate(run_dir: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure the newest checkpoint of a run. `changes`: overrides of its settings, e.g. {"evaluate.windows": 256}.

    Writes `eval.json`, `eval_core.json`, `features.parquet` and `report.html` to the run directory. Returns eval.json's
    content with `report`, the page's path. Raises UserError where there is no checkpoint or the held-out activations do
    not fit it.
    """
    connect()
    run_dir = run_path(run_dir)
    config = load_dictionary(run_dir)[1].override(changes or {})
    cluster = config.cluster
    require(cluster.cpus_per_model, cluster.gpus_per_model, "evaluation")
    name = f"evaluate {files.name(run_dir)}"  # as the dashboard shows it
    task = ray.remote(_measure).options(name=name, num_cpus=cluster.cpus_per_model, num_gpus=cluster.gpus_per_model)
    return ray.get(task.remote(run_dir, config))


def _measure(run_dir: str, config: Config) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_model)))
    device = "cuda" if config.cluster.gpus_per_model else "cpu"
    held_out = open_store(files.join(config.source.path, "held_out"))
    measured = evaluation.measure(load_dictionary(run_dir)[0], config, held_out, device)
    found = measured.evaluation
    write_features(run_dir, measured.features)
    files.write_json(files.join(run_dir, core.FILE), measured.core)
    files.write_json(files.join(run_dir, "eval.json"), found)
    return found | {"report": write_report(run_dir, config, logs.read(run_dir), found)}
