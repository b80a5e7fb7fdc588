"""The start of b_dec, from a sample of training rows in the dictionary's units, one site after another.

mean              ȳ
geometric_median  argmin_m Σ ‖y_b - m‖ for each site, by Weiszfeld's iteration
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.dictionary import Dictionary


@torch.no_grad()
def start_bias(dictionary: Dictionary, rows: Callable[[str], Float[Tensor, "B d"]], kind: str) -> None:
    """Set b_dec from the rows of each written site; the same rows on every rank give the same b_dec."""
    d = dictionary
    for site, where in d.wiring.columns(d.wiring.written_sites).items():
        y = ((rows(site).to(d.b_dec) - d.write_mean[where]) / d.write_scale[where]).double()
        d.b_dec[where] = (y.mean(dim=0) if kind == "mean" else geometric_median(y)).to(d.b_dec.dtype)


def geometric_median(
    points: Float[Tensor, "n d"], iterations: int = 100, tolerance: float = 1e-10
) -> Float[Tensor, "d"]:
    """The point with the least sum of distances to the rows (Weiszfeld 1937)."""
    centre = points.mean(dim=0)
    for _ in range(iterations):
        weight = 1 / torch.linalg.vector_norm(points - centre, dim=1).clamp(min=1e-12)
        moved = (points * weight.unsqueeze(1)).sum(dim=0) / weight.sum()
        if torch.linalg.vector_norm(moved - centre) <= tolerance * torch.linalg.vector_norm(moved):
            return moved
        centre = moved
    return centre
