"""Thresholds for a dictionary that was trained with TopK or BatchTopK, and how many features pass them.

With "kept" the entries that the gate keeps in its training form, batch by batch,

    running mean   θ_i = θ                                     the gate's own inference threshold of i's pool
    mean of least  θ_i = E_tokens[least score kept]            for TopK a group, which has none of its own
    per feature    θ_i = E_batches[least f_i kept]             over the batches in which i is kept at all

(θ / n_i where the gate ranks by decoder norm n_i), and L0 as a function of a common factor s of a group's thresholds,

    L0(s) = E #{i : pre_i > s θ_i},        s = 10^(-1 + k / 2^14), k = 0 … 2^15

which are the points where 15 bisections of s ∈ [0.1, 10] can end. One pass counts them all, so that none is repeated.
Counts are exact, sums float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.config.dictionary import JumpReluGate
from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.dictionary.build import make_gate
from xlc_ray.dictionary.gates import Gate, JumpReLU, TopK
from xlc_ray.dictionary.selection import LEAST

HALF = 2**14
SCALES = torch.from_numpy(10.0 ** (np.arange(-HALF, HALF + 1) / HALF))
"""The factors s, ascending; SCALES[HALF] is exactly 1."""


@dataclass
class Kept:
    """What a gate keeps of one group: counts, and sums of the least that is kept."""

    tokens: int
    entries: int
    least: Tensor
    """Σ over batches of the least f kept of each feature [F] float64."""
    batches: Tensor
    """Batches in which the feature was kept [F] int64."""
    least_score: float
    """Σ over tokens of the least score kept."""
    scored: int
    """Tokens with a kept entry."""

    @classmethod
    def empty(cls, features: int) -> Kept:
        """Before any batch, of a group of so many features."""
        return cls(0, 0, torch.zeros(features, dtype=torch.float64), torch.zeros(features, dtype=torch.int64), 0.0, 0)

    def update(self, features: Features, norms: Tensor | None) -> None:
        """Add one batch. `norms` [F]: scores are f times these; None: scores are f."""
        tokens, size = features.shape
        token, feature, value = features.entries()
        value = value.detach().double()
        least = _least(value, feature, size)
        score = _least(value if norms is None else value * norms.double()[feature], token, tokens)
        self.tokens += tokens
        self.entries += len(value)
        self.least += least.where(least.isfinite(), 0).cpu()
        self.batches += least.isfinite().cpu()
        self.least_score += score.where(score.isfinite(), 0).sum().item()
        self.scored += int(score.isfinite().sum())

    @property
    def l0(self) -> float:
        """Features kept a token."""
        return self.entries / self.tokens


def pool_thresholds(dictionary: Dictionary, kept: list[Kept]) -> list[Tensor]:
    """θ [F] of each group by the gate's running mean, or where it has none by the mean of the least score kept.

    Equals the gate's inference form where that has a threshold; a JumpReLU gate gives its own θ."""
    gate = dictionary.gate
    if isinstance(gate, JumpReLU):
        return [gate.threshold(g).detach().clone() for g in range(len(kept))]
    assert isinstance(gate, TopK)
    found = []
    for g, (group, seen) in enumerate(zip(dictionary.groups, kept, strict=True)):
        mean = group.b_enc.new_tensor(seen.least_score / max(seen.scored, 1))
        own = gate.inference_threshold[0 if gate.over_groups else g] if gate.shared else mean
        norms = dictionary.norms(g).detach()
        found.append(own / norms.clamp(min=LEAST) if gate.needs_norms else own.expand_as(norms).clone())
    return found


def feature_thresholds(kept: list[Kept], otherwise: list[Tensor]) -> list[Tensor]:
    """θ [F] of each group by the mean of the least value kept of each feature; `otherwise` where none was kept."""
    means = [seen.least / seen.batches.clamp(min=1) for seen in kept]
    return [
        mean.to(other).where((seen.batches > 0).to(other.device), other)
        for mean, seen, other in zip(means, kept, otherwise, strict=True)
    ]


@torch.no_grad()
def with_thresholds(dictionary: Dictionary, thresholds: list[Tensor]) -> Dictionary:
    """The same dictionary with a JumpReLU gate of these θ (a tensor [F] a group), in inference form."""
    gate = make_gate(JumpReluGate(parameterisation="direct"), [len(theta) for theta in thresholds], dictionary.shards)
    assert isinstance(gate, JumpReLU)
    gate.to(thresholds[0])
    for own, theta in zip(gate.raw_threshold, thresholds, strict=True):
        own.copy_(theta)
    return with_gate(dictionary, gate.eval())


def with_gate(dictionary: Dictionary, gate: Gate) -> Dictionary:
    """A second dictionary of the same weights, which are shared and not copied, with another gate, in its form."""
    made = copy.copy(dictionary)
    made._modules = dict(dictionary._modules)
    made.gate, made.training = gate, gate.training
    return made


@dataclass
class Ladder:
    """How many entries of one group pass its thresholds at each of SCALES."""

    tokens: int
    passed: Tensor
    """Entries that pass exactly the k lowest scales [2^15 + 2] int64."""

    @classmethod
    def empty(cls) -> Ladder:
        """Before any batch."""
        return cls(0, torch.zeros(len(SCALES) + 1, dtype=torch.int64))

    def update(self, features: Features, threshold: Tensor) -> None:
        """Add a batch: features f = pre where pre > 0.1 θ, and θ [F] itself."""
        _, feature, value = features.entries()
        ratio = value.detach().double() / threshold.double()[feature]  # θ = 0: infinite, passes at every scale
        steps = torch.bucketize(ratio, SCALES.to(ratio.device))
        self.passed += torch.bincount(steps, minlength=len(self.passed)).cpu()
        self.tokens += features.shape[0]

    def l0(self) -> Tensor:
        """L0 at each of SCALES, falling."""
        return (self.passed.sum() - self.passed.cumsum(0))[:-1].double() / max(self.tokens, 1)

    def scale(self, target: float, tolerance: float, name: str) -> tuple[float, float]:
        """The factor whose L0 is nearest the target, and that L0; 1 wherever that is near enough.

        Raises UserError, naming the group, where no factor comes within the tolerance."""
        l0 = self.l0()
        best = HALF if abs(float(l0[HALF]) - target) <= tolerance else int((l0 - target).abs().argmin())
        if not abs(float(l0[best]) - target) <= tolerance:
            raise UserError(
                f"convert: {name}: thresholds times 0.1 to 10 give an l0 of {float(l0[0]):.4g} to {float(l0[-1]):.4g} "
                f"on {self.tokens:,} tokens, none within {tolerance:g} of {target:.4g}; "
                "change --target-l0 or --tolerance, or raise train.calibration_tokens"
            )
        return float(SCALES[best]), float(l0[best])


def _least(values: Tensor, where: Tensor, size: int) -> Tensor:
    """The least of the values at each place [size], inf where there is none."""
    return values.new_full((size,), torch.inf).scatter_reduce(0, where, values, "amin")
