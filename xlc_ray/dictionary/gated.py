"""Gated features: whether a feature is active and how strongly are learned apart (Rajamanoharan et al. 2024,
arXiv 2404.16014).

    π = pre + b_gate              m = e^r ⊙ pre + b_mag              pre = x W_encᵀ + b_enc
    f = 1[π > 0] ReLU(m)
    loss = ‖y - ŷ(f)‖² + λ Σ ReLU(π) + a ‖y - ŷ'(ReLU(π))‖²,        ŷ' = the decoder with its bias, frozen

The step 1[π > 0] has no gradient: the gate learns from the last two terms alone. b_enc stands where the paper has
-W b_dec, the part that both share. All of b_gate, r and b_mag [F] start at 0, so that at first f = ReLU(pre).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xlc_ray.dictionary.gates import Gate, at
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.sparse import Support


def per_feature(sizes: list[int], start: float) -> nn.ParameterList:
    """A parameter [F] for each group."""
    return nn.ParameterList([nn.Parameter(torch.full((n,), start)) for n in sizes])


class Gated(Gate):
    """See the module. `auxiliary` = a."""

    b_gate: Sequence[nn.Parameter]
    r_mag: Sequence[nn.Parameter]
    b_mag: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards, auxiliary: float):
        super().__init__(sizes, shards)
        self.auxiliary = auxiliary
        for name in ("b_gate", "r_mag", "b_mag"):
            setattr(self, name, per_feature(sizes, 0.0))

    def threshold(self, g: int) -> Tensor:
        return -self.b_gate[g]

    def lower(self, g: int) -> Tensor:
        return self.threshold(g).detach()

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        return self.strength(pre, g, support) * (pre + at(self.b_gate[g], support) > 0)

    def strength(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """ReLU(m)."""
        return torch.relu(at(self.r_mag[g].exp(), support) * pre + at(self.b_mag[g], support))

    def auxiliary_values(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """ReLU(π)."""
        return torch.relu(pre + at(self.b_gate[g], support))

    def penalised(self, values: Tensor, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """ReLU(π)."""
        return self.auxiliary_values(pre, g, support)
