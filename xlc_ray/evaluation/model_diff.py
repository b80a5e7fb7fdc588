"""What fine-tuning changed: the features of a crosscoder over a model and the base that it was tuned from.

With d_i and d'_i feature i's decoder rows for the model and its base, in normalised units (each model by its own
statistics), f_i its activations, and y a target of either model (Minder et al. 2025, arXiv 2504.02922):

    relative_norm  r = ‖d‖ / (‖d‖ + ‖d'‖)                       shared: 0.3 to 0.7
    delta          Δ = ½ ((‖d‖ - ‖d'‖) / max(‖d‖, ‖d'‖) + 1)    only the model's: ≥ 0.9; only the base's: ≤ 0.1
    cosine         d·d' / (‖d‖ ‖d'‖)
    scaling of y   β(y) = Σ f ⟨d, y⟩ / (Σ f² ‖d‖²)              the multiple of f d that explains y best
    nu_reconstruction = β(ŷ') / β(ŷ)                            ŷ, ŷ': reconstructions, biases included
    nu_error          = β(e' + f d') / β(e + f d)               e, e': errors; with the feature left out of ŷ and ŷ'

A feature that by its norms is only the model's is so *genuinely* where nu_error < 0.2 and nu_reconstruction < 0.5: else
the base holds the direction too, in its error (the norm had shrunk) or by other features. Sums are over the tokens
seen, in float64, one pass: Σ f², and two numbers Σ f ⟨d, ŷ⟩, Σ f ⟨d, e⟩ a feature and model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlc_ray.activations.sites import BASE
from xlc_ray.dictionary import Dictionary, Features, Wiring

SHARED = (0.3, 0.7)
"""Relative norms of features that both models share."""
ONE_MODEL = 0.1
"""Δ this close to 0 or 1: a feature of one model only."""
GENUINE = {"nu_error": 0.2, "nu_reconstruction": 0.5}
"""Below both, a feature of the model is none of its base."""
BINS = 40
LISTED = 100
"""Features of the model only that are listed, the most frequent first."""
ENTRIES = 2**22
"""Numbers of decoder rows held at a time."""


@dataclass
class ModelDiff:
    """Sums over tokens, of the one group that writes a site of both models."""

    group: int
    site: str
    columns: tuple[slice, slice]
    """Of the site in the model and in the base, within y."""
    rows: tuple[Float[Tensor, "F d"], Float[Tensor, "F _"]]
    """Decoder rows for the model and for its base, float64."""
    tokens: int
    active: Int[Tensor, "F"]
    squares: Float[Tensor, "F"]
    """Σ f²."""
    dots: Float[Tensor, "2 2 F"]
    """Σ f ⟨d, y⟩; first of the model, then of the base; first y = reconstruction, then y = error."""

    @staticmethod
    def of(dictionary: Dictionary) -> ModelDiff | None:
        """Empty sums; None where no group writes one site of both models and no other."""
        wiring = dictionary.wiring
        if (found := compared(wiring)) is None:
            return None
        g, site = found
        whole, own = (wiring.columns(sites) for sites in (wiring.written_sites, wiring.writes[g]))
        decoder = dictionary.groups[g].W_dec.detach().double()
        names, features = (site, site + BASE), decoder.shape[0]
        return ModelDiff(
            g,
            site,
            (whole[names[0]], whole[names[1]]),
            (decoder[:, own[names[0]]], decoder[:, own[names[1]]]),
            0,
            torch.zeros(features, dtype=torch.int64),
            torch.zeros(features, dtype=torch.float64),
            torch.zeros(2, 2, features, dtype=torch.float64),
        )

    @property
    def comparable(self) -> bool:
        """Whether both models' sites have one width: else rows of one say nothing about the other."""
        return self.rows[0].shape == self.rows[1].shape

    def update(self, features: list[Features], y: Float[Tensor, "B W"], y_hat: Float[Tensor, "B W"]) -> None:
        """Add a batch: features of each group, targets and reconstruction in normalised units."""
        own = features[self.group]
        token, feature, value = own.entries()
        self.tokens += own.shape[0]
        self.active += own.count().cpu()
        self.squares += _sum(value.double().square(), feature, own.shape[1])
        if not self.comparable:
            return
        targets = [[y_hat[:, here].double(), y[:, here].double() - y_hat[:, here].double()] for here in self.columns]
        step = max(1, ENTRIES // self.rows[0].shape[1])
        for first in range(0, len(token), step):
            part = slice(first, first + step)
            weighted = self.rows[0][feature[part]] * value[part].double().unsqueeze(1)
            for m, pair in enumerate(targets):
                for t, target in enumerate(pair):
                    dots = torch.linalg.vecdot(weighted, target[token[part]])
                    self.dots[m, t] += _sum(dots, feature[part], own.shape[1])

    def sums(self) -> ModelDiff:
        """The same without the decoder rows: all that another process needs to merge, which has the rows itself."""
        none = torch.zeros(0, 0, dtype=torch.float64)
        return replace(self, rows=(none, none))

    def merge(self, other: ModelDiff) -> None:
        """Add what another process saw of the same dictionary on other tokens."""
        assert (self.group, self.site) == (other.group, other.site)
        self.tokens += other.tokens
        self.active = self.active + other.active
        self.squares = self.squares + other.squares
        self.dots = self.dots + other.dots

    def per_feature(self) -> dict[str, Tensor]:
        """Each quantity named at the top, and `frequency`: [F] float64, NaN where it has no value."""
        mine, base = (rows.cpu() for rows in self.rows)
        norm, base_norm = (torch.linalg.vector_norm(rows, dim=1) for rows in (mine, base))
        missing = torch.full_like(norm, torch.nan)
        found = {
            "frequency": self.active.double() / max(self.tokens, 1),
            "relative_norm": norm / (norm + base_norm),
            "delta": ((norm - base_norm) / torch.maximum(norm, base_norm) + 1) / 2,
            "cosine": missing,
            "nu_reconstruction": missing,
            "nu_error": missing,
        }
        if self.comparable:
            across = torch.linalg.vecdot(mine, base)
            found["cosine"] = across / (norm * base_norm)
            found["nu_reconstruction"] = _quotient(self.dots[1, 0], self.dots[0, 0])
            left_out = self.dots[:, 1] + self.squares * torch.stack([norm.square(), across])
            found["nu_error"] = _quotient(left_out[1], left_out[0])
        return found

    def compute(self) -> dict[str, Any]:
        """Plain data: classes of features, histograms, cosines of shared features, latent scaling of the model's own.

        Only features that were active count. Classes: model_only, base_only, shared, between (none of the three).
        """
        found = {name: values.numpy() for name, values in self.per_feature().items()}
        alive = (self.active > 0).numpy()
        own, base = found["delta"] >= 1 - ONE_MODEL, found["delta"] <= ONE_MODEL
        shared = (found["relative_norm"] >= SHARED[0]) & (found["relative_norm"] <= SHARED[1])
        classes = {"model_only": own, "base_only": base, "shared": shared, "between": ~(own | base | shared)}
        classes = {name: mask & alive for name, mask in classes.items()}
        return {
            "sites": [self.site, self.site + BASE],
            "tokens": self.tokens,
            "alive": int(alive.sum()),
            "features": len(alive),
            "classes": {name: int(mask.sum()) for name, mask in classes.items()},
            "relative_norm": _histogram(found["relative_norm"][alive], 0.0),
            "cosine_of_shared": _histogram(found["cosine"][classes["shared"]], -1.0),
            "latent_scaling": _scaling(found, classes["model_only"]) if self.comparable else None,
            "model_only": _listed(found, classes["model_only"]),
        }


def compared(wiring: Wiring) -> tuple[int, str] | None:
    """(group, site) where just one group writes a site of a model and the same of its base, and nothing else."""
    groups = [
        (g, sites[0].removesuffix(BASE))
        for g, sites in enumerate(wiring.writes)
        if len(sites) == 2 and {*sites} == {sites[0].removesuffix(BASE), sites[0].removesuffix(BASE) + BASE}
    ]
    return groups[0] if len(groups) == 1 else None


def _sum(values: Tensor, feature: Tensor, features: int) -> Tensor:
    """Σ of values by feature, on the CPU."""
    return values.new_zeros(features).index_add_(0, feature, values).cpu()


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator != 0, numerator / denominator, torch.nan)


def _histogram(values: np.ndarray, low: float) -> dict[str, Any]:
    """Edges and counts from `low` to 1, and the mean and median; None where there is no value."""
    values = values[np.isfinite(values)].clip(low, 1.0)
    counts, edges = np.histogram(values, np.linspace(low, 1.0, BINS + 1))
    middle = {"mean": _or_none(np.mean, values), "median": _or_none(np.median, values)}
    return {"edges": edges.tolist(), "counts": counts.tolist(), **middle}


def _scaling(found: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    below = [found[name][chosen] < limit for name, limit in GENUINE.items()]
    medians = {f"median_{name}": _or_none(np.nanmedian, found[name][chosen]) for name in GENUINE}
    return {"features": int(chosen.sum()), "genuine": int(np.logical_and(*below).sum()), **medians}


def _listed(found: dict[str, np.ndarray], chosen: np.ndarray) -> list[dict[str, Any]]:
    order = sorted(np.flatnonzero(chosen), key=lambda i: (-found["frequency"][i], i))[:LISTED]
    return [{"feature": int(i), **{k: _finite(float(v[i])) for k, v in found.items()}} for i in order]


def _or_none(statistic: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    return float(statistic(values)) if np.isfinite(values).any() else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
