"""The evaluation of one dictionary on held-out activations and text: what stands in eval.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.pair import ModelPair, load_models
from xlc_ray.activations.store import Store, decode
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.evaluation.model_diff import ModelDiff
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.replacement import Batch, evaluate_replacement, prepare


def evaluate(
    dictionary: Dictionary, config: Config, held_out_store: Store, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Measure a dictionary on held-out tokens: reconstruction, then the replacement model.

    Returns the headline numbers and `tokens`, with `sites` (site → metrics), `groups` (list: reads, writes, features,
    l0, dead_features), `feature_density` and `replacement` (None where evaluate.windows is 0; then ce_recovered, kl and
    top1_agreement are None too); of a model-diff crosscoder also `model_diff`. The dictionary moves to `device` and is
    left in its inference form. Raises UserError where the store lacks a site that the dictionary reads or writes, or
    the text that is to be read.
    """
    settings, wiring = config.evaluate, dictionary.wiring
    if lacking := [site for site in wiring.sites if site not in held_out_store.manifest.sites]:
        known = ", ".join(held_out_store.manifest.sites)
        raise UserError(f"evaluate: the held-out store has no site {lacking[0]}; it has: {known}")
    if settings.windows and held_out_store.manifest.fingerprint is None:
        raise UserError(f"evaluate.windows: {held_out_store.path} does not know the text of its rows; allowed: 0")
    dictionary = dictionary.to(device).eval()
    batches = held_out_batches(held_out_store, wiring.sites, settings.batch_tokens, settings.tokens)
    diff = ModelDiff.of(dictionary)
    found = evaluate_reconstruction(dictionary, batches, diff.update if diff else None).compute()
    replacement = None
    if settings.windows:
        model = load_models(config, wiring.sites, device)
        windows = held_out_windows(held_out_store, settings.batch_windows, settings.windows, device)
        if isinstance(model, ModelPair):
            replacement = evaluate_pair(dictionary, model, windows)
        else:
            replacement = evaluate_replacement(dictionary, model, windows)
    wires = zip(found["groups"], wiring.reads, wiring.writes, strict=True)
    whole = replacement["all"] if replacement else {}
    headline = {name: found.pop(name) for name in ("explained_variance", "fvu", "l0", "dead_features")}
    return {
        **headline,
        **{name: whole.get(name) for name in ("ce_recovered", "kl", "top1_agreement")},
        **found,
        "groups": [{"reads": list(reads), "writes": list(writes), **group} for group, reads, writes in wires],
        "replacement": replacement,
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
