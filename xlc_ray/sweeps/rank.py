"""One rank of one trial: the training of single runs, from stop to stop, and what is measured on held-out tokens there.

A stop is a rung or the last step. It leaves a checkpoint and a line in the trial's metrics.jsonl whose `held_out/…`
are measured in inference form on the first `evaluate.tokens` held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from xlc_ray import files
from xlc_ray.activations.store import open_store
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.run import held_out_batches
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


class TrialRank:
    """Training of one rank that pauses at each stop."""

    def __init__(
        self,
        config: Config,
        stops: Collection[int],
        shards: Shards,
        device: torch.device,
        announce: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ):
        self.config = config
        data = open_store(config.source.path)
        self.held_out = open_store(files.join(config.source.path, "held_out"))
        # Read in this process: several trials share a machine, where readers of their own would outnumber learners.
        reader = loop.in_process(config, data, shards)
        self.parts = loop.train_in_parts(
            config, data, shards, reader, device, announce, lambda step, metrics: None, stops, self.measure
        )

    def advance(self) -> dict[str, Any]:
        """Train to the next stop. Returns the line of metrics that it left there."""
        return next(self.parts)

    def measure(self, dictionary: Dictionary) -> dict[str, float]:
        """{held_out/name: value} of MEASURED, where it has one."""
        settings = self.config.evaluate
        batches = held_out_batches(self.held_out, dictionary.wiring.sites, settings.batch_tokens, settings.tokens)
        found = evaluate_reconstruction(dictionary, batches).compute()
        return {PREFIX + name: found[name] for name in MEASURED if found[name] is not None}

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
