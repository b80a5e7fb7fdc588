"""One rank of one trial: the training of single runs, from stop to stop, and what is measured on held-out tokens there.

A stop is a rung or the last step. It leaves a checkpoint and a line in the trial's metrics.jsonl whose `held_out/…`
are measured in inference form on the first `evaluate.tokens` held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.store import open_source
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import evaluate_replacement
from xlc_ray.evaluation.run import held_out_batches, held_out_windows
from xlc_ray.training import logs, loop

PREFIX = "held_out/"
MEASURED = (
    "fvu",
    "explained_variance",
    "l0",
    "dead_features",
    "cosine_similarity",
    "l2_ratio",
    "relative_reconstruction_bias",
)
"""What a stop measures, by the names of eval.json."""
PREDICTED = ("ce_recovered", "kl", "top1_agreement")
"""Measured too if the sweep judges by one of them: the language model runs on `evaluate.windows` held-out windows."""


class TrialRank:
    """Training of one rank that pauses at each stop."""

    def __init__(
        self,
        config: Config,
        stops: Collection[int],
        shards: Shards,
        device: torch.device,
        announce: Callable[[dict[str, Any]], None] = lambda metrics: None,
        predictions: bool = False,
    ):
        self.config, self.device, self.predictions = config, device, predictions
        self.models: LanguageModel | ModelPair | None = None
        data = open_source(config.source)
        self.held_out = open_source(config.source, "held_out")
        # Read in this process: several trials share a machine, where readers of their own would outnumber learners.
        reader = loop.in_process(config, data, shards)
        self.parts = loop.train_in_parts(
            config, data, shards, reader, device, announce, lambda step, metrics: None, stops, more=self.measure
        )

    def advance(self) -> dict[str, Any]:
        """Train to the next stop. Returns the line of metrics that it left there."""
        return next(self.parts)

    def measure(self, dictionary: Dictionary) -> dict[str, float]:
        """{held_out/name: value} of MEASURED, and of PREDICTED where that is asked for; without those of no value."""
        settings = self.config.evaluate
        batches = held_out_batches(self.held_out, dictionary.wiring.sites, settings.batch_tokens, settings.tokens)
        found = evaluate_reconstruction(dictionary, batches).compute()
        found = {name: found[name] for name in MEASURED} | (self._predict(dictionary) if self.predictions else {})
        return {PREFIX + name: value for name, value in found.items() if value is not None}

    def _predict(self, dictionary: Dictionary) -> dict[str, float | None]:
        settings = self.config.evaluate
        if self.models is None:
            self.models = load_models(self.config, dictionary.wiring.sites, self.device)
        windows = held_out_windows(self.held_out, settings.batch_windows, settings.windows, self.device)
        dictionary.eval()
        if isinstance(self.models, ModelPair):
            found = evaluate_pair(dictionary, self.models, windows).compute()["all"]
        else:
            found = evaluate_replacement(dictionary, self.models, windows).compute()["all"]
        dictionary.train()
        return {name: found[name] for name in PREDICTED}

    def close(self) -> None:
        """Stop training; what the last stop wrote stays."""
        self.parts.close()


def measured(run_dir: str) -> dict[int, dict[str, float]]:
    """{step: {name: value}} of every stop that a trial has come to."""
    found = {}
    for line in logs.read(run_dir):
        if held_out := {k.removeprefix(PREFIX): v for k, v in line.items() if k.startswith(PREFIX)}:
            found[line["step"]] = held_out
    return found
