"""The start of b_dec, from a sample of training rows in the dictionary's units.

mean              ȳ
geometric_median  argmin_m Σ ‖y_b - m‖ for each site, by Weiszfeld's iteration
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.dictionary import Dictionary


@torch.no_grad()
def start_bias(dictionary: Dictionary, y: Float[Tensor, "B W"], kind: str) -> None:
    """Set b_dec from targets y; the same y on every rank gives the same b_dec."""
    columns = dictionary.wiring.columns(dictionary.wiring.written_sites)
    for where in columns.values():
        site = y[:, where].double()
        dictionary.b_dec[where] = (site.mean(dim=0) if kind == "mean" else geometric_median(site)).to(y.dtype)


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
