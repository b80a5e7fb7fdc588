"""Evaluation as a job: Ray tasks each measure a run on a share of the held-out tokens, and one writes what they found.

Their sums come to the driver, which merges them in the order of the shares: who was fastest is not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from xlc_ray import evaluation, files
from xlc_ray.activations.store import Store, open_source
from xlc_ray.cluster.placement import require_model
from xlc_ray.cluster.session import connect, run_path
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.dictionary.checkpoint import load_dictionary, settings, steps
from xlc_ray.evaluation import Effects, Share, Sums, core
from xlc_ray.evaluation.ablation import Which
from xlc_ray.evaluation.features import write_features
from xlc_ray.training import logs

CHANGEABLE = ("evaluate", "cluster", "source", "model", "base_model", "seed")
"""Sections that may differ from training's: model, where it lies elsewhere; seed, which draws the ablated features."""


def evaluate(run_dir: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure the newest checkpoint of a run. `changes`: overrides of its settings, e.g. {"evaluate.windows": 256}.

    Writes `eval.json`, `eval_core.json`, `features.parquet` and `report.html` to the run directory. Returns eval.json's
    content with `report`, the page's path. Raises UserError where there is no checkpoint or the held-out activations do
    not fit it, and on a change of what training has decided.
    """
    check_changes(changes)
    connect()
    run_dir = run_path(run_dir)
    config = settings(run_dir).override(changes or {})
    step = steps(run_dir)[-1]  # of all tasks, though training may go on and write a newer one
    cpus, gpus, workers = config.cluster.cpus_per_model, config.cluster.gpus_per_model, config.evaluate.workers
    # Tasks wait for one another where the cluster holds fewer at a time: it must hold one.
    require_model(config.cluster, "evaluation")
    name = f"evaluate {files.name(run_dir)}"  # as the dashboard shows it
    measure = ray.remote(_measure).options(name=name, num_cpus=cpus, num_gpus=gpus)
    ablate = ray.remote(_ablate).options(name=name, num_cpus=cpus, num_gpus=gpus)
    shares = [Share(n, workers) for n in range(workers)]
    sums, *others = ray.get([measure.remote(run_dir, step, config, share) for share in shares])
    for other in others:
        sums.merge(other)
    effects = None
    if chosen := evaluation.ablated_features(config, sums):
        effects, *others = ray.get([ablate.remote(run_dir, step, config, share, chosen) for share in shares])
        for other in others:
            effects.merge(other)
    finish = ray.remote(_finish).options(name=name, num_cpus=cpus)
    return ray.get(finish.remote(run_dir, step, config, sums, effects))


def check_changes(changes: Mapping[str, Any] | None, *more: str) -> None:
    """Raises UserError on an override of what a trained run has decided; `more`: other settings that are free."""
    for path in changes or {}:
        if path.split(".")[0] not in CHANGEABLE and path not in more:
            raise UserError(f"{path}: is taken from the run; allowed: {', '.join((*CHANGEABLE, *more))}")


def _measure(run_dir: str, step: int, config: Config, share: Share) -> Sums:
    return evaluation.measure_share(*_opened(run_dir, step, config), share)


def _ablate(run_dir: str, step: int, config: Config, share: Share, chosen: Sequence[Which]) -> Effects:
    return evaluation.ablate_share(*_opened(run_dir, step, config), chosen, share)


def _opened(run_dir: str, step: int, config: Config) -> tuple[Dictionary, Config, Store, str]:
    """The dictionary, its settings, its held-out rows, and the device to use; as many threads as the task has CPUs."""
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_model)))
    store = open_source(config.source, "held_out")
    return load_dictionary(run_dir, step)[0], config, store, "cuda" if config.cluster.gpus_per_model else "cpu"


def _finish(run_dir: str, step: int, config: Config, sums: Sums, effects: Effects | None) -> dict[str, Any]:
    from xlc_ray.evaluation.report import write_report  # with its drawing library, which the others do not need

    torch.set_num_threads(max(1, int(config.cluster.cpus_per_model)))
    measured = evaluation.finish(load_dictionary(run_dir, step)[0], sums, effects)
    found = measured.evaluation
    write_features(run_dir, measured.features)
    files.write_json(files.join(run_dir, core.FILE), measured.core)
    files.write_json(files.join(run_dir, "eval.json"), found)
    return found | {"report": write_report(run_dir, config, logs.read(run_dir), found)}
