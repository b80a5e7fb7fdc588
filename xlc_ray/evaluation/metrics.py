"""Streaming metrics of a dictionary, as sums in float64 that can be updated, merged and computed at any time.

With x [d] a site's activation, x̂ its reconstruction, r = x - x̂, E the mean over tokens, f the features:

    explained_variance           = 1 - E‖r‖² / (E‖x‖² - ‖E x‖²)          fvu = 1 - explained_variance
    cosine_similarity            = E[x·x̂ / (‖x‖ ‖x̂‖)]                   l2_ratio = E[‖x̂‖ / ‖x‖]
    relative_reconstruction_bias = E‖x̂‖² / E[x·x̂]
    l0                           = E #{i : f_i ≠ 0}                      dead_features = share of features never active
    feature_density              = histogram of log10(frequency + 1e-10)

Metrics of a site are in raw units. The *total* explained_variance and fvu are one ratio of sums over all written
sites **in the dictionary's normalised units**, where each site is scaled, so that a site with large activations does
not own the number. cosine_similarity, l2_ratio and relative_reconstruction_bias are averaged over sites. A quotient
whose denominator is zero has no value and is None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlc_ray.config import UserError

DENSITY_EDGES = np.linspace(-10.0, 0.0, 41)
"""Edges of the density histogram, in log10 of the frequency: quarters of a decade; the first bin holds the dead."""


@dataclass
class Moments:
    """Sums over tokens of one pair (target, reconstruction) of width d."""

    count: int
    total: Tensor
    """Σ x [d]."""
    square: float = 0.0
    """Σ ‖x‖²."""
    residual: float = 0.0
    """Σ ‖x - x̂‖²."""
    predicted: float = 0.0
    """Σ ‖x̂‖²."""
    dot: float = 0.0
    """Σ x·x̂."""
    cosine: float = 0.0
    """Σ x·x̂ / (‖x‖ ‖x̂‖), 0 where either is zero."""
    ratio: float = 0.0
    """Σ ‖x̂‖ / ‖x‖ over the tokens with x ≠ 0."""
    nonzero: int = 0
    """Tokens with x ≠ 0."""

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Before any token, of vectors so wide."""
        return cls(count=0, total=torch.zeros(width, dtype=torch.float64))

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add rows x, x_hat [B, d]."""
        assert x.shape == x_hat.shape, (x.shape, x_hat.shape)
        x, x_hat = x.double(), x_hat.double()
        square, predicted, dot = x.square().sum(1), x_hat.square().sum(1), (x * x_hat).sum(1)
        norm, norm_hat = square.sqrt(), predicted.sqrt()
        seen, both = norm > 0, (norm > 0) & (norm_hat > 0)
        self.count += len(x)
        self.total += x.sum(0).cpu()
        self.square += square.sum().item()
        self.residual += (x - x_hat).square().sum().item()
        self.predicted += predicted.sum().item()
        self.dot += dot.sum().item()
        self.cosine += (dot[both] / (norm[both] * norm_hat[both])).sum().item()
        self.ratio += (norm_hat[seen] / norm[seen]).sum().item()
        self.nonzero += int(seen.sum())

    def merge(self, other: Moments) -> None:
        """Add the tokens that another accumulator saw."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def variance(self) -> float:
        """Σ‖x - x̄‖², per-dimension mean; 0 where it is nothing but rounding."""
        value = self.square - float(self.total.square().sum()) / max(self.count, 1)
        return value if value > 1e-13 * self.square else 0.0

    def compute(self) -> dict[str, float | None]:
        """The quotients named at the top of this file."""
        fvu = _divide(self.residual, self.variance)
        return {
            "explained_variance": None if fvu is None else 1.0 - fvu,
            "fvu": fvu,
            "cosine_similarity": _divide(self.cosine, self.count),
            "l2_ratio": _divide(self.ratio, self.nonzero),
            "relative_reconstruction_bias": _divide(self.predicted, self.dot),
        }


@dataclass
class Activity:
    """How often each feature of one group was active."""

    tokens: int
    counts: Tensor
    """Active tokens of each feature [F] int64."""

    @classmethod
    def empty(cls, features: int) -> Activity:
        """Before any token, of a group of so many features."""
        return cls(tokens=0, counts=torch.zeros(features, dtype=torch.int64))

    def update(self, counts: Tensor, tokens: int) -> None:
        """Add a batch of `tokens` tokens, in which feature i was active counts[i] times."""
        self.counts = self.counts + counts.cpu()
        self.tokens += tokens

    def merge(self, other: Activity) -> None:
        """Add the tokens that another accumulator saw."""
        self.update(other.counts, other.tokens)

    def compute(self) -> dict[str, Any]:
        """l0 (features a token), dead_features (share never active in these tokens), features."""
        return {
            "features": len(self.counts),
            "l0": _divide(float(self.counts.sum()), self.tokens),
            "dead_features": float((self.counts == 0).double().mean()),
        }

    def density(self) -> list[int]:
        """Number of features in each bin of DENSITY_EDGES."""
        frequency = self.counts.double().numpy() / max(self.tokens, 1)
        logs = np.log10(frequency + 1e-10).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1])
        return np.histogram(logs, DENSITY_EDGES)[0].tolist()


@dataclass
class ReconstructionMetrics:
    """All metrics of a dictionary on a stream of batches; see the top of this file."""

    sites: dict[str, Moments]
    """Written site → moments in raw units."""
    total: Moments
    """All written sites side by side, in normalised units."""
    groups: list[Activity]

    @classmethod
    def empty(cls, widths: dict[str, int], features: list[int]) -> ReconstructionMetrics:
        """`widths`: written site → width; `features`: features of each group."""
        sites = {site: Moments.empty(width) for site, width in widths.items()}
        return cls(sites, Moments.empty(sum(widths.values())), [Activity.empty(n) for n in features])

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.total.count

    def update(
        self, raw: dict[str, Tensor], raw_hat: dict[str, Tensor], y: Tensor, y_hat: Tensor, counts: list[Tensor]
    ) -> None:
        """Add a batch: site → [B, d] and its reconstruction, both normalised [B, W], each group's active tokens [F]."""
        for site, moments in self.sites.items():
            moments.update(raw[site], raw_hat[site])
        self.total.update(y, y_hat)
        for activity, count in zip(self.groups, counts, strict=True):
            activity.update(count, len(y))

    def merge(self, other: ReconstructionMetrics) -> None:
        """Add what another process measured on other tokens."""
        assert self.sites.keys() == other.sites.keys()
        for site, moments in self.sites.items():
            moments.merge(other.sites[site])
        self.total.merge(other.total)
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            mine.merge(theirs)

    def _check(self) -> None:
        if not self.tokens:
            raise UserError(
                "evaluate: the held-out activations hold no rows; set generate.held_out_tokens to more than 0"
            )
        for site, moments in self.sites.items():
            if not math.isfinite(moments.square):
                raise UserError(f"evaluate: {site}: the held-out activations are not finite; try model.dtype: float32")
            if not math.isfinite(moments.residual):
                raise UserError(
                    f"evaluate: {site}: the reconstruction is not finite; the dictionary diverged in training"
                )

    def compute(self) -> dict[str, Any]:
        """tokens, totals by name, `sites` (site → metrics), `groups` (list), `feature_density` (edges and counts).

        Raises UserError where there was no row, or where a site or its reconstruction is not finite."""
        self._check()
        sites = {site: moments.compute() for site, moments in self.sites.items()}
        every = Activity(self.tokens, torch.cat([group.counts for group in self.groups]))
        total = self.total.compute()
        means = ("cosine_similarity", "l2_ratio", "relative_reconstruction_bias")
        return {
            "tokens": self.tokens,
            "explained_variance": total["explained_variance"],
            "fvu": total["fvu"],
            **{name: _mean([site[name] for site in sites.values()]) for name in means},
            "l0": every.compute()["l0"],
            "dead_features": every.compute()["dead_features"],
            "sites": sites,
            "groups": [group.compute() for group in self.groups],
            "feature_density": {
                "log10_edges": DENSITY_EDGES.tolist(),
                "total": every.density(),
                "groups": [group.density() for group in self.groups],
            },
        }


def _divide(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _divide(sum(known), len(known))
