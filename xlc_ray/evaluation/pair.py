"""The replacement model of a dictionary over two models: the reconstruction of each model's sites is spliced into it.

Features come from the clean runs of both models on the same tokens, the base with its replaced ones. Each model is
scored against itself, on the tokens that it reads: cross-entropy, KL and agreement as in replacement.py. `all` takes
the scored predictions of both models together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.pair import ModelPair
from xlc_ray.activations.sites import of_base
from xlc_ray.dictionary import Dictionary
from xlc_ray.evaluation.replacement import Batch, Score, Scores, capture, check_scored, compare, forward, substitute


@dataclass
class PairReplacement:
    """What both models scored on windows of text."""

    written: tuple[str, ...]
    model: Scores
    base_model: Scores
    windows: int = 0

    def of(self, base: bool) -> Scores:
        """Those of the model or of its base."""
        return self.base_model if base else self.model

    def merge(self, other: PairReplacement) -> None:
        """Add the windows that another accumulator saw."""
        self.model.merge(other.model)
        self.base_model.merge(other.base_model)
        self.windows += other.windows

    def compute(self) -> dict[str, Any]:
        """What `Replacement.compute` returns, with `models` (model, base_model: each with all its sites replaced) and a
        ce_original in each entry. Raises UserError likewise.
        """
        check_scored(self.model.clean.tokens + self.base_model.clean.tokens)
        used = {name: own for name, own in (("model", self.model), ("base_model", self.base_model)) if own.sites}
        clean, replaced, ablated = Score(), Score(), Score()
        for own in used.values():
            clean.merge(own.clean)
            replaced.merge(own.replaced[None])
            ablated.merge(own.ablated[None])
        return {
            "tokens": clean.tokens,
            "windows": self.windows,
            "replacement_inputs": "clean",
            "ce_original": clean.ce,
            "all": {"ce_original": clean.ce, **compare(clean, replaced, ablated, "all written sites")},
            "sites": {site: _scores(self.of(of_base(site)), site, site) for site in self.written},
            "models": {name: _scores(own, None, name) for name, own in used.items()},
        }


def evaluate_pair(dictionary: Dictionary, pair: ModelPair, batches: Iterable[Batch]) -> PairReplacement:
    """Score both models with their reconstructions. `batches`: windows as the model (not the base) reads them.

    Raises UserError where a model cannot read the windows.
    """
    written = tuple(dictionary.wiring.written_sites)
    mine, base = (Scores.empty(tuple(s for s in written if of_base(s) is which)) for which in (False, True))
    found = PairReplacement(written, mine, base)
    for batch in batches:
        _add(dictionary, pair, found, batch)
        found.windows += len(batch.tokens)
    return found


def _scores(own: Scores, variant: str | None, name: str) -> dict[str, float | None]:
    """The metrics of one variant, with the clean model's cross-entropy."""
    return {"ce_original": own.clean.ce, **own.compute(variant, name)}


@torch.no_grad()
def _add(dictionary: Dictionary, pair: ModelPair, found: PairReplacement, batch: Batch) -> None:
    rows: dict[str, Tensor] = {}
    runs = []
    for base, model in ((False, pair.model), (True, pair.base)):
        own = _as_base(pair, batch) if base else batch
        model.check(own.tokens)
        sites = [site for site in dictionary.wiring.sites if of_base(site) is base]
        runs.append((found.of(base), model, own, forward(model, own, capture(sites, batch.keep, rows))))
    rebuilt = dictionary.reconstruct(rows)
    for scores, model, own, original in runs:
        if scores.sites:
            one = {site: substitute({site: rebuilt[site]}, batch.keep) for site in scores.sites}
            both = substitute({site: rebuilt[site] for site in scores.sites}, batch.keep)
            scores.update(model, own, original, {None: both, **one})


def _as_base(pair: ModelPair, batch: Batch) -> Batch:
    """The same windows with the tokens that the base reads, and is to predict."""
    read = pair.base_tokens(batch.tokens)
    return replace(batch, tokens=read, targets=read.roll(-1, dims=1)[batch.scored])
