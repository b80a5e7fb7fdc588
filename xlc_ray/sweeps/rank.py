"""One rank of a trial, or of several on one stream: the training of single runs, from stop to stop, and what is
measured on held-out tokens there.

A stop is a rung or the last step. It leaves a checkpoint and a line in the trial's metrics.jsonl whose `held_out/…`
are measured in inference form on the first `evaluate.tokens` held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.store import open_source
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards, checkpoint
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import evaluate_replacement
from xlc_ray.evaluation.run import held_out_batches, held_out_windows
from xlc_ray.training import Diverged, logs, loop
from xlc_ray.training.saving import Stop, asked_to_stop
from xlc_ray.training.together import Run, Together

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


@dataclass(frozen=True)
class Task:
    """A trial, as its ranks are told."""

    name: str
    config: Config
    stops: tuple[int, ...]
    """Steps at which it is measured, the last one included."""
    predictions: bool
    """Whether the language model's predictions are measured too."""


Found = dict[str, float]
"""{name: value} on held-out tokens."""


class TrialRank:
    """One rank of trials that share a stream, most often of just one."""

    def __init__(
        self,
        tasks: Sequence[Task],
        shards: Shards,
        device: torch.device,
        announce: Callable[[str, dict[str, Any]], None] = lambda name, metrics: None,
        batches: loop.ReadBatches | None = None,
    ):
        """`announce(name, metrics)` is told of each line of a trial's metrics. `batches` reads the stream.

        Without it the store is read in this process."""
        longest = max((task.config for task in tasks), key=lambda config: config.train.steps)
        self.data = open_source(longest.source)
        self.held_out = open_source(longest.source, "held_out")
        self.device = device
        self.models: LanguageModel | ModelPair | None = None
        runs = {
            task.name: Run(
                task.config,
                task.stops,
                partial(announce, task.name),
                partial(self.measure, task),
                partial(asked_to_stop, task.config.out),
                self._said(task, shards),
            )
            for task in tasks
        }
        # No pipeline reads ahead: several trials share a machine, where readers would outnumber learners.
        if batches is None:
            reader = loop.in_process(longest, self.data, shards, device)
        else:
            reader = loop.reading(batches, longest, self.data, shards)
        self.together = Together(runs, self.data, shards, reader, device)

    @property
    def names(self) -> tuple[str, ...]:
        """The trials that are left."""
        return self.together.names

    def advance(self) -> tuple[int, dict[str, Found | Diverged | Stop]]:
        """Train to the next stop: its step, and what each trial that came to it measured there, or what ended it."""
        said = self.together.advance()
        return self.together.step, {n: e if isinstance(e, Exception) else held_out(e) for n, e in said.items()}

    def _said(self, task: Task, shards: Shards) -> dict[int, dict[str, Any]]:
        """What it said at stops of an earlier session. Where its newest checkpoint is of a stop that no line tells of,
        because another job wrote it or the line was lost, it is measured now."""
        out, lines = task.config.out, logs.read(task.config.out)
        known = {line["step"]: line for line in lines if line["step"] in task.stops and held_out(line)}
        step = checkpoint.newest(out, shards)
        if step in task.stops and step not in known:
            known[step] = self.measure(task, checkpoint.load_dictionary(out, step)[0].to(self.device))
        return known

    def measure(self, task: Task, dictionary: Dictionary) -> Found:
        """{held_out/name: value} of MEASURED, and of PREDICTED where that is asked for; without those of no value."""
        settings = task.config.evaluate
        batches = held_out_batches(self.held_out, dictionary.wiring.sites, settings.batch_tokens, settings.tokens)
        found = evaluate_reconstruction(dictionary, batches).compute()
        found = {name: found[name] for name in MEASURED} | (self._predict(task, dictionary) if task.predictions else {})
        return {PREFIX + name: value for name, value in found.items() if value is not None}

    def _predict(self, task: Task, dictionary: Dictionary) -> dict[str, float | None]:
        settings = task.config.evaluate
        if self.models is None:
            self.models = load_models(task.config, dictionary.wiring.sites, self.device)
        windows = held_out_windows(self.held_out, settings.batch_windows, settings.windows, self.device)
        dictionary.eval()
        if isinstance(self.models, ModelPair):
            found = evaluate_pair(dictionary, self.models, windows).compute()["all"]
        else:
            found = evaluate_replacement(dictionary, self.models, windows).compute()["all"]
        dictionary.train()
        return {name: found[name] for name in PREDICTED}

    def leave(self, names: Iterable[str]) -> None:
        """Stop training these, if they still do; what their last stop wrote stays."""
        for name in set(names) & set(self.together.names):
            self.together.leave(name)

    def close(self) -> None:
        """Stop training all."""
        self.together.close()


def held_out(line: Mapping[str, Any]) -> Found:
    """What a line of metrics says of held-out tokens."""
    return {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}


def measured(run_dir: str) -> dict[int, Found]:
    """{step: {name: value}} of every stop that a trial has come to."""
    return {line["step"]: found for line in logs.read(run_dir) if (found := held_out(line))}
