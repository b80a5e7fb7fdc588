"""Per-site scale and centre: x ↦ (x - μ) / s, undone in the dictionary's output, foldable into its weights.

    none       s = 1
    rms        s = √(E‖x - μ‖² / d)          E‖x‖² becomes d
    unit       s = √E‖x - μ‖²                E‖x‖² becomes 1   (Rajamanoharan et al. 2024)
    mean_norm  s = E‖x‖ / √d                 E‖x‖ becomes √d   (Anthropic, April 2024; not centred)
    mean_std   s_i = std_i + 1e-6            each dimension, unbiased, centred  (crosslayer-coding)

μ is the site's mean if centred, else 0. Statistics are those of the stored training rows, which carry the token mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.config import UserError


@runtime_checkable
class SiteStatistics(Protocol):
    """What is known of a site's stored rows; arrays are float64 [d]; `mean_norm` = E‖x‖ or None if unknown."""

    @property
    def count(self) -> int: ...
    @property
    def mean(self) -> np.ndarray: ...
    @property
    def std(self) -> np.ndarray: ...
    @property
    def mean_norm(self) -> float | None: ...


def affine(
    kind: str, center: bool, sites: tuple[str, ...], widths: Mapping[str, int], stats: Mapping[str, SiteStatistics]
) -> tuple[Float[Tensor, "W"], Float[Tensor, "W"]]:
    """Mean and scale of each column where `sites` stand side by side, float64.

    Raises UserError on missing statistics."""
    means, scales = [], []
    for site in sites:
        d = widths[site]
        if kind == "none" and not center:
            means.append(np.zeros(d))
            scales.append(np.ones(d))
            continue
        if site not in stats:
            raise UserError(f"dictionary.normalization: the store has no statistics of {site}")
        mean = np.asarray(stats[site].mean) if center else np.zeros(d)
        means.append(mean)
        scales.append(_scale(kind, center, site, stats[site], d))
    return torch.from_numpy(np.concatenate(means)), torch.from_numpy(np.concatenate(scales))


def _scale(kind: str, center: bool, site: str, stats: SiteStatistics, d: int) -> np.ndarray:
    std, mean = np.asarray(stats.std), np.asarray(stats.mean)
    if kind == "none":
        return np.ones(d)
    if kind == "mean_std":
        return std + 1e-6
    if kind in ("rms", "unit"):
        variance = std**2 * (stats.count - 1) / stats.count
        second = variance.sum() + (0.0 if center else (mean**2).sum())
        scale = np.sqrt(second / (d if kind == "rms" else 1))
    elif stats.mean_norm is None:
        raise UserError(
            f"dictionary.normalization.kind: mean_norm needs E|x| of {site}, which this store lacks; use rms"
        )
    else:
        scale = stats.mean_norm / np.sqrt(d)
    if not scale > 0:
        raise UserError(f"dictionary.normalization: {site} is constant in the stored rows, so it has no scale")
    return np.full(d, scale)
