"""Conversion as a job: one Ray task makes of a TopK or BatchTopK run a JumpReLU run, in a directory of its own."""

from __future__ import annotations

from typing import Any

import ray
import torch

from xlc_ray import files
from xlc_ray.activations.store import is_there, open_source
from xlc_ray.cluster.evaluate import check_changes
from xlc_ray.cluster.placement import require_model
from xlc_ray.cluster.session import connect, resolve, run_path
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary, checkpoint
from xlc_ray.evaluation.convert import convert_dictionary
from xlc_ray.training import logs

SAMPLE = ("train.calibration_tokens", "train.batch_tokens", "train.accumulate")
"""Settings of training by which the rows are taken that thresholds are calibrated on."""


def convert(
    run_dir: str,
    out: str,
    changes: dict[str, Any] | None = None,
    *,
    per_feature: bool = False,
    target_l0: float | None = None,
    tolerance: float = 0.1,
    fold: bool = False,
) -> dict[str, Any]:
    """Convert the newest checkpoint of a run to the gate jumprelu. `changes`: overrides of its settings.

    `out` becomes a run directory that evaluate and load read: config.yaml, one checkpoint, the curves of training, and
    conversion.json, which is returned with `out`. See evaluation/convert.py for the options. Raises UserError where
    `out` holds a run already, where there is no checkpoint, or where the gate or the target cannot be converted.
    """
    if not out:
        raise UserError("--out: missing; give --out DIR, a directory for the converted run")
    check_changes(changes, *SAMPLE)
    connect()
    run_dir = run_path(run_dir)
    config = resolve(checkpoint.settings(run_dir).override({**(changes or {}), "out": out}))
    if files.listdir(config.out):
        raise UserError(f"{config.out}: is not empty; choose another --out")
    cluster = config.cluster
    require_model(cluster, "conversion")
    name = f"convert {files.name(run_dir)}"  # as the dashboard shows it
    task = ray.remote(_convert).options(name=name, num_cpus=cluster.cpus_per_model, num_gpus=cluster.gpus_per_model)
    options = {"per_feature": per_feature, "target_l0": target_l0, "tolerance": tolerance, "folded": fold}
    return ray.get(task.remote(run_dir, config, options)) | {"out": config.out}


def _convert(run_dir: str, config: Config, options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_model)))
    device = "cuda" if config.cluster.gpus_per_model else "cpu"
    held_out = files.join(config.source.path, "held_out")
    there = is_there(held_out)
    found = convert_dictionary(
        checkpoint.load_dictionary(run_dir)[0],
        config,
        open_source(config.source),
        open_source(config.source, "held_out") if there else None,
        device=device,
        **options,
    )
    curves = files.join(run_dir, logs.FILE)
    if files.exists(curves):
        files.write_bytes(files.join(config.out, logs.FILE), files.read_bytes(curves))
    files.write_json(files.join(config.out, "conversion.json"), found.report)
    _save(run_dir, found.config, found.dictionary)
    return found.report


def _save(run_dir: str, config: Config, dictionary: Dictionary) -> None:
    """config.yaml, and a checkpoint of the same step without what only training needs."""
    files.write_bytes(files.join(config.out, "config.yaml"), config.yaml().encode())
    step = checkpoint.steps(run_dir)[-1]
    own = {"wiring": checkpoint.describe(dictionary.wiring), "converted_from": run_dir}
    facts = checkpoint.facts(run_dir, step) | own
    facts.pop("step")
    dictionary.to(torch.float64 if config.train.precision == "float64" else torch.float32)
    tensors = checkpoint.dictionary_tensors(dictionary)
    checkpoint.save(config.out, step, tensors, facts, config.train.keep, dictionary.shards)
