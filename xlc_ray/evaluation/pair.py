"""The replacement model of a dictionary over two models: the reconstruction of each model's sites is spliced into it.

Features come from the clean runs of both models on the same tokens, the base with its replaced ones. Each model is
scored against itself, on the tokens that it reads: cross-entropy, KL and agreement as in replacement.py. `all` takes
the scored predictions of both models together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair
from xlc_ray.activations.sites import of_base
from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.evaluation.replacement import Batch, Score, ablate, capture, compare, forward, substitute


@dataclass
class _Part:
    """One of the two models: its written sites, and its scores by variant (None = all of them at once)."""

    name: str
    model: LanguageModel
    sites: tuple[str, ...]
    clean: Score = field(default_factory=Score)
    replaced: dict[str | None, Score] = field(default_factory=dict)
    ablated: dict[str | None, Score] = field(default_factory=dict)

    def update(self, batch: Batch, original: Tensor, rebuilt: dict[str, Tensor]) -> None:
        """Add a batch of windows as this model reads it: its clean logits, and its sites' reconstructions."""
        self.clean.update(original, original, batch.targets)
        for variant in (None, *self.sites):
            names = self.sites if variant is None else (variant,)
            for scores, visits in (
                (self.replaced, substitute({site: rebuilt[site] for site in names}, batch.keep)),
                (self.ablated, ablate(names, batch.keep)),
            ):
                logits = forward(self.model, batch, visits)
                scores.setdefault(variant, Score()).update(logits, original, batch.targets)

    def scores(self, variant: str | None) -> dict[str, float | None]:
        """The metrics of one variant, with the clean model's cross-entropy."""
        found = compare(self.clean, self.replaced[variant], self.ablated[variant], variant or self.name)
        return {"ce_original": self.clean.ce, **found}


def evaluate_pair(dictionary: Dictionary, pair: ModelPair, batches: Iterable[Batch]) -> dict[str, Any]:
    """Score both models with their reconstructions. `batches`: windows as the model (not the base) reads them.

    Returns what `evaluate_replacement` does, with `models` (model, base_model: each with all its sites replaced) and a
    ce_original in each entry. Raises UserError likewise.
    """
    wiring = dictionary.wiring
    written = {base: tuple(s for s in wiring.written_sites if of_base(s) is base) for base in (False, True)}
    parts = {
        base: _Part(name, model, written[base])
        for base, name, model in ((False, "model", pair.model), (True, "base_model", pair.base))
    }
    windows = 0
    for batch in batches:
        windows += len(batch.tokens)
        _add(dictionary, pair, parts, batch)
    if not parts[False].clean.tokens + parts[True].clean.tokens:
        raise UserError("evaluate.windows: no held-out token can be scored; use more windows or a longer text.context")
    used = [part for part in parts.values() if part.sites]
    clean, replaced, ablated = Score(), Score(), Score()
    for part in used:
        clean.merge(part.clean)
        replaced.merge(part.replaced[None])
        ablated.merge(part.ablated[None])
    return {
        "tokens": clean.tokens,
        "windows": windows,
        "replacement_inputs": "clean",
        "ce_original": clean.ce,
        "all": {"ce_original": clean.ce, **compare(clean, replaced, ablated, "all written sites")},
        "sites": {site: parts[of_base(site)].scores(site) for site in wiring.written_sites},
        "models": {part.name: part.scores(None) for part in used},
    }


@torch.no_grad()
def _add(dictionary: Dictionary, pair: ModelPair, parts: dict[bool, _Part], batch: Batch) -> None:
    rows: dict[str, Tensor] = {}
    runs = {}
    for base, part in parts.items():
        own = _as_base(pair, batch) if base else batch
        part.model.check(own.tokens)
        sites = [site for site in dictionary.wiring.sites if of_base(site) is base]
        runs[base] = own, forward(part.model, own, capture(sites, batch.keep, rows))
    rebuilt = dictionary.reconstruct(rows)
    for base, part in parts.items():
        if part.sites:
            part.update(*runs[base], rebuilt)


def _as_base(pair: ModelPair, batch: Batch) -> Batch:
    """The same windows with the tokens that the base reads, and is to predict."""
    read = pair.base_tokens(batch.tokens)
    return replace(batch, tokens=read, targets=read.roll(-1, dims=1)[batch.scored])
