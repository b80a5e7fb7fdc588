"""The evaluation of one dictionary on held-out activations and text: eval.json, eval_core.json, features.parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.store import Store, decode
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.evaluation.ablation import ablate_features, sample_features
from xlc_ray.evaluation.core import CoreWatch, core_metrics
from xlc_ray.evaluation.features import FeatureWatch, feature_table
from xlc_ray.evaluation.model_diff import ModelDiff
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import Batch, evaluate_replacement, prepare


@dataclass(frozen=True)
class Measurement:
    """What one evaluation found."""

    evaluation: dict[str, Any]
    """eval.json."""
    core: dict[str, Any]
    """eval_core.json: see core.py."""
    features: pa.Table
    """features.parquet: see features.py."""


def evaluate(
    dictionary: Dictionary, config: Config, held_out_store: Store, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """What stands in eval.json: see `measure`."""
    return measure(dictionary, config, held_out_store, device).evaluation


def measure(
    dictionary: Dictionary, config: Config, held_out_store: Store, device: str | torch.device = "cpu"
) -> Measurement:
    """Measure a dictionary on held-out tokens: reconstruction and features in one pass, then the replacement model.

    eval.json holds the headline numbers and `tokens`, with `sites` (site → metrics), `groups` (list: reads, writes,
    features, l0, dead_features), `feature_density`, `replacement` (None where evaluate.windows is 0; then ce_recovered,
    kl and top1_agreement are None too) and `ablated_features` (see ablation.py; empty where evaluate.ablate_features is
    0); of a model-diff crosscoder also `model_diff`. The dictionary moves to `device` and left in its inference form.
    Raises UserError where the store lacks a site that the dictionary reads or writes, or the text that is to be read.
    """
    settings, wiring = config.evaluate, dictionary.wiring
    if lacking := [site for site in wiring.sites if site not in held_out_store.manifest.sites]:
        known = ", ".join(held_out_store.manifest.sites)
        raise UserError(f"evaluate: the held-out store has no site {lacking[0]}; it has: {known}")
    if settings.windows and not held_out_store.manifest.has_text:
        raise UserError(f"evaluate.windows: {held_out_store.path} does not know the text of its rows; allowed: 0")
    if settings.ablate_features and not settings.windows:
        raise UserError("evaluate.ablate_features: needs the replacement model; set evaluate.windows to more than 0")
    dictionary = dictionary.to(device).eval()
    watch = FeatureWatch.empty(list(dictionary.sizes))
    core = CoreWatch.empty({site: wiring.widths[site] for site in wiring.written_sites})
    batches = held_out_batches(held_out_store, wiring.sites, settings.batch_tokens, settings.tokens)
    diff = ModelDiff.of(dictionary)
    metrics = evaluate_reconstruction(dictionary, batches, [watch, core], diff)
    replacement, ablated = _predictions(dictionary, config, held_out_store, watch, device)
    return Measurement(
        _evaluation(dictionary, metrics.compute(), replacement, ablated, diff),
        core_metrics(dictionary, core, watch.groups, replacement),
        feature_table(dictionary, watch, metrics.sites),
    )


def _predictions(
    dictionary: Dictionary, config: Config, store: Store, watch: FeatureWatch, device: str | torch.device
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The replacement model's scores, and the effects of single features if asked for."""
    settings = config.evaluate
    if not settings.windows:
        return None, []
    model = load_models(config, dictionary.wiring.sites, device)

    def windows() -> Iterator[Batch]:
        return held_out_windows(store, settings.batch_windows, settings.windows, device)

    if isinstance(model, ModelPair):
        if settings.ablate_features:
            raise UserError("evaluate.ablate_features: zeroes features of one model; allowed with base_model: 0")
        return evaluate_pair(dictionary, model, windows()), []
    replacement = evaluate_replacement(dictionary, model, windows())
    if not settings.ablate_features:
        return replacement, []
    chosen = sample_features(watch.groups, settings.ablate_features, config.seed)
    return replacement, ablate_features(dictionary, model, windows(), chosen).compute()


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


def held_out_batches(store: Store, sites: Iterable[str], batch_rows: int, most: int) -> Iterator[dict[str, Tensor]]:
    """The first `most` rows of a store, in its order, as {site: [at most batch_rows, width]} float32; none dropped."""
    sites, left = tuple(sites), most
    for chunk, rows in enumerate(store.chunk_rows):
        for start in range(0, min(rows, left), batch_rows):
            stop = min(start + batch_rows, rows, left)
            found = store.read(chunk, start, stop, sites)
            yield {site: decode(values, store.manifest.dtype) for site, values in found.items()}
        left -= min(rows, left)


def held_out_windows(store: Store, batch_windows: int, most: int, device: str | torch.device) -> Iterator[Batch]:
    """The first `most` windows of text behind a store, `batch_windows` at a time.

    Kept are exactly the positions that the store holds as rows.
    """
    left = most
    for chunk in range(len(store.chunk_rows)):
        if not left:
            return
        text = store.windows(chunk)
        assert text is not None, "a store without text has been refused"
        keep = torch.zeros(text.windows.tokens.shape, dtype=torch.bool)
        keep[torch.from_numpy(text.row_window).long(), torch.from_numpy(text.row_position).long()] = True
        tokens, length = torch.from_numpy(text.windows.tokens), torch.from_numpy(text.windows.length)
        here = min(len(tokens), left)
        for start in range(0, here, batch_windows):
            part = slice(start, min(start + batch_windows, here))
            yield prepare(tokens[part], length[part], keep[part], device)
        left -= here
