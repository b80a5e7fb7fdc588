"""What single features are worth to the predictions: zero one in the replacement model and compare.

    delta_ce = E[H(feature zeroed) - H(replacement)]      H = cross-entropy of a scored token, nats; > 0: it helped
    kl       = E KL(p_replacement ‖ p_zeroed)

E is the mean over all scored tokens, so that a feature counts by how often it is active too. A feature that no kept
position of a batch activates changes nothing there, and costs no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.evaluation.features import FeatureStatistics
from xlc_ray.evaluation.replacement import (
    Batch,
    Score,
    Visit,
    capture,
    forward,
    replace_all,
    replaceable_in_place,
    substitute,
)

Which = tuple[int, int]
"""Group and feature."""
Edit = Callable[[int, Features], Features]


@dataclass
class Effects:
    """Sums over scored tokens, for each ablated feature [N] float64."""

    features: list[Which]
    tokens: int
    delta: Tensor
    """Σ H(zeroed) - H(replacement)."""
    divergence: Tensor
    """Σ KL(p_replacement ‖ p_zeroed)."""

    @classmethod
    def empty(cls, features: Sequence[Which]) -> Effects:
        """Before any window, of these features."""
        zeros = torch.zeros(len(features), dtype=torch.float64)
        return cls(list(features), 0, zeros, zeros.clone())

    def merge(self, other: Effects) -> None:
        """Add the windows that another accumulator saw."""
        assert self.features == other.features
        self.tokens += other.tokens
        self.delta = self.delta + other.delta
        self.divergence = self.divergence + other.divergence

    def compute(self) -> list[dict[str, Any]]:
        """group, feature, delta_ce, kl of each, the most helpful first."""
        tokens = max(self.tokens, 1)
        found = [
            {"group": g, "feature": i, "delta_ce": delta / tokens, "kl": divergence / tokens}
            for (g, i), delta, divergence in zip(
                self.features, self.delta.tolist(), self.divergence.tolist(), strict=True
            )
        ]
        return sorted(found, key=lambda one: -one["delta_ce"])


def sample_features(features: Sequence[FeatureStatistics], most: int, seed: int) -> list[Which]:
    """At most so many features that were active, drawn at random from all groups together, in order."""
    alive = [(g, int(i)) for g, own in enumerate(features) for i in own.counts.nonzero()[:, 0]]
    drawn = np.random.default_rng(seed).permutation(len(alive))[:most]
    return [alive[n] for n in sorted(drawn)]


@torch.no_grad()
def ablate_features(
    dictionary: Dictionary, model: LanguageModel, batches: Iterable[Batch], features: Sequence[Which]
) -> Effects:
    """Zero each of the features (group, feature) in turn in the replacement model, all written sites replaced.

    `dictionary` is in its inference form, on the device of `model`."""
    found = Effects.empty(features)
    for batch in batches:
        model.check(batch.tokens)
        active: dict[int, Tensor] = {}
        plain = _run(dictionary, model, batch, lambda g, f, active=active: _note(active, g, f))
        before = Score()
        before.update(plain, plain, batch.targets)
        found.tokens += before.tokens
        for n, (g, i) in enumerate(found.features):
            if not active[g][i]:
                continue
            after = Score()
            after.update(_run(dictionary, model, batch, _zero(g, i)), plain, batch.targets)
            found.delta[n] += after.cross_entropy - before.cross_entropy
            found.divergence[n] += after.divergence
    return found


def _run(dictionary: Dictionary, model: LanguageModel, batch: Batch, edit: Edit) -> Tensor:
    """Logits of the replacement model whose features pass through `edit`."""
    if replaceable_in_place(dictionary.wiring):
        return forward(model, batch, replace_all(dictionary, batch.keep, edit))
    rows: dict[str, Tensor] = {}
    forward(model, batch, capture(dictionary.wiring.sites, batch.keep, rows))
    x = dictionary.normalize_inputs(rows)
    features = [edit(g, own) for g, own in enumerate(dictionary.encode(x))]
    visits: dict[str, Visit] = substitute(dictionary.denormalize(dictionary.decode(features, x)), batch.keep)
    return forward(model, batch, visits)


def _note(active: dict[int, Tensor], g: int, features: Features) -> Features:
    active[g] = features.count() > 0
    return features


def _zero(group: int, feature: int) -> Edit:
    def edit(g: int, features: Features) -> Features:
        if g != group:
            return features
        if features.support:
            return replace(features, values=features.values.where(features.support.feature != feature, 0))
        values = features.values.clone()
        values[:, feature] = 0
        return replace(features, values=values)

    return edit
