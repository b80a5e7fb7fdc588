"""The evaluation of one dictionary on held-out activations and text: eval.json, eval_core.json, features.parquet.

One process measures everything, or several take a share each: what a share holds is sums, which merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.sites import of_base
from xlc_ray.activations.store import Store, check_model
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.evaluation.ablation import Effects, Which, ablate_features, sample_features
from xlc_ray.evaluation.core import CoreWatch, core_metrics
from xlc_ray.evaluation.features import FeatureWatch, feature_table
from xlc_ray.evaluation.held_out import WHOLE, Share, held_out_batches, held_out_windows
from xlc_ray.evaluation.metrics import ReconstructionMetrics
from xlc_ray.evaluation.model_diff import ModelDiff
from xlc_ray.evaluation.pair import PairReplacement, evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import Replacement, evaluate_replacement


@dataclass(frozen=True)
class Measurement:
    """What one evaluation found."""

    evaluation: dict[str, Any]
    """eval.json."""
    core: dict[str, Any]
    """eval_core.json: see core.py."""
    features: pa.Table
    """features.parquet: see features.py."""


@dataclass
class Sums:
    """What one worker saw of the held-out rows and windows. On the CPU, and small: vectors of features and widths."""

    metrics: ReconstructionMetrics
    features: FeatureWatch
    core: CoreWatch
    diff: ModelDiff | None
    replacement: Replacement | PairReplacement | None

    def merge(self, other: Sums) -> None:
        """Add what another worker saw, with the same dictionary and settings."""
        self.metrics.merge(other.metrics)
        self.features.merge(other.features)
        self.core.merge(other.core)
        if self.diff and other.diff:
            self.diff.merge(other.diff)
        match self.replacement, other.replacement:
            case Replacement() as mine, Replacement() as theirs:
                mine.merge(theirs)
            case PairReplacement() as mine, PairReplacement() as theirs:
                mine.merge(theirs)
            case mine, theirs:
                assert mine is theirs is None


def evaluate(
    dictionary: Dictionary, config: Config, held_out_store: Store, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """What stands in eval.json: see `measure`."""
    return measure(dictionary, config, held_out_store, device).evaluation


def measure(
    dictionary: Dictionary, config: Config, held_out_store: Store, device: str | torch.device = "cpu"
) -> Measurement:
    """Measure a dictionary on held-out tokens, all of them here: `measure_share`, `ablate_share` and `finish`.

    eval.json holds the headline numbers and `tokens`, with `sites` (site → metrics), `groups` (list: reads, writes,
    features, l0, dead_features), `feature_density`, `replacement` (None where evaluate.windows is 0; then ce_recovered,
    kl and top1_agreement are None too) and `ablated_features` (see ablation.py; empty where evaluate.ablate_features is
    0); of a model-diff crosscoder also `model_diff`. The dictionary moves to `device` and is left in its inference
    form. Raises UserError where the store lacks a site that the dictionary reads or writes, or the text to be read.
    """
    sums = measure_share(dictionary, config, held_out_store, device)
    chosen = ablated_features(config, sums)
    effects = ablate_share(dictionary, config, held_out_store, device, chosen) if chosen else None
    return finish(dictionary, sums, effects)


def measure_share(
    dictionary: Dictionary, config: Config, store: Store, device: str | torch.device, share: Share = WHOLE
) -> Sums:
    """Reconstruction and features of a share of the rows, in one pass, then the replacement model on its windows.

    Raises UserError as `measure` does, but for what only all the shares together can show, which `finish` looks at.
    """
    _check(dictionary, config, store)
    settings, wiring = config.evaluate, dictionary.wiring
    dictionary = dictionary.to(device).eval()
    watch = FeatureWatch.empty(list(dictionary.sizes))
    core = CoreWatch.empty({site: wiring.widths[site] for site in wiring.written_sites})
    diff = ModelDiff.of(dictionary)
    batches = held_out_batches(store, wiring.sites, settings.batch_tokens, settings.tokens, share)
    metrics = evaluate_reconstruction(dictionary, batches, [watch, core], diff)
    replacement = _replacement(dictionary, config, store, device, share) if settings.windows else None
    return Sums(metrics, watch, core, diff.sums() if diff else None, replacement)


def ablated_features(config: Config, sums: Sums) -> list[Which]:
    """The features to zero one by one, drawn from those that were active in all the shares together."""
    return sample_features(sums.features.groups, config.evaluate.ablate_features, config.seed)


def ablate_share(
    dictionary: Dictionary,
    config: Config,
    store: Store,
    device: str | torch.device,
    chosen: Sequence[Which],
    share: Share = WHOLE,
) -> Effects:
    """What zeroing each of the chosen features does to the predictions of a share of the windows."""
    settings, model = config.evaluate, load_models(config, dictionary.wiring.sites, device)
    assert isinstance(model, LanguageModel), "a pair has been refused"
    windows = held_out_windows(store, settings.batch_windows, settings.windows, device, share)
    return ablate_features(dictionary.to(device).eval(), model, windows, chosen)


def finish(dictionary: Dictionary, sums: Sums, effects: Effects | None) -> Measurement:
    """The results of all shares merged. Raises UserError where they hold no row or scored token, or are not finite."""
    metrics = sums.metrics.compute()
    replacement = sums.replacement.compute() if sums.replacement else None
    ablated = effects.compute() if effects else []
    diff = ModelDiff.of(dictionary)
    if diff and sums.diff:
        diff.merge(sums.diff)
    return Measurement(
        _evaluation(dictionary, metrics, replacement, ablated, diff),
        core_metrics(dictionary, sums.core, sums.metrics.sites, sums.features.groups, replacement),
        feature_table(dictionary, sums.features, sums.metrics.sites),
    )


def _check(dictionary: Dictionary, config: Config, store: Store) -> None:
    settings = config.evaluate
    if lacking := [site for site in dictionary.wiring.sites if site not in store.manifest.sites]:
        known = ", ".join(store.manifest.sites)
        raise UserError(f"evaluate: the held-out store has no site {lacking[0]}; it has: {known}")
    widths, have = dictionary.wiring.widths, store.manifest.sites
    if other := [site for site in dictionary.wiring.sites if have[site] != widths[site]]:
        raise UserError(
            f"evaluate: {other[0]} of the held-out store {store.path} is {have[other[0]]} wide, that of the dictionary "
            f"{widths[other[0]]}; allowed: activations of the model that it was trained on"
        )
    check_model(store, config.model.name)
    if settings.windows and not store.manifest.has_text:
        raise UserError(f"evaluate.windows: {store.path} does not know the text of its rows; allowed: 0")
    if settings.ablate_features and not settings.windows:
        raise UserError("evaluate.ablate_features: needs the replacement model; set evaluate.windows to more than 0")
    if settings.ablate_features and any(map(of_base, dictionary.wiring.sites)):
        raise UserError("evaluate.ablate_features: zeroes features of one model; allowed with base_model: 0")


def _replacement(
    dictionary: Dictionary, config: Config, store: Store, device: str | torch.device, share: Share
) -> Replacement | PairReplacement:
    settings, model = config.evaluate, load_models(config, dictionary.wiring.sites, device)
    windows = held_out_windows(store, settings.batch_windows, settings.windows, device, share)
    if isinstance(model, ModelPair):
        return evaluate_pair(dictionary, model, windows)
    return evaluate_replacement(dictionary, model, windows)


def _evaluation(
    dictionary: Dictionary,
    found: dict[str, Any],
    replacement: dict[str, Any] | None,
    ablated: list[dict[str, Any]],
    diff: ModelDiff | None,
) -> dict[str, Any]:
    wires = zip(found["groups"], dictionary.wiring.reads, dictionary.wiring.writes, strict=True)
    whole = replacement["all"] if replacement else {}
    headline = {name: found.pop(name) for name in ("explained_variance", "fvu", "l0", "dead_features")}
    return {
        **headline,
        **{name: whole.get(name) for name in ("ce_recovered", "kl", "top1_agreement")},
        **found,
        "groups": [{"reads": list(reads), "writes": list(writes), **group} for group, reads, writes in wires],
        "replacement": replacement,
        "ablated_features": ablated,
        **({"model_diff": diff.compute()} if diff else {}),
    }
