"""Hard Concrete gates: each feature is multiplied by a random gate z that is exactly 0 or 1 with positive probability,
and smooth enough for the expected L0 to have a gradient (Louizos et al. 2017, arXiv 1712.01312).

    training    z = clamp(σ((logit u + α) / β) (ζ - γ) + γ, 0, 1),   u uniform in (0, 1),   γ < 0 < 1 < ζ
    inference   z = clamp(σ(α) (ζ - γ) + γ, 0, 1)                    (no noise, no β)
    L0          Σ P(z > 0) = Σ σ(α - β log(-γ/ζ))

    HardConcrete, by input   f = z · (x W_magᵀ + b_mag)     α = pre
    HardConcrete, free       f = z · pre                     α [F] a parameter
    GatedHardConcrete        f = z · ReLU(e^r ⊙ pre + b_mag) α = pre + b_gate;  plus a ‖y - ŷ'(z)‖², decoder frozen

Magnitudes of the first two have a sign. β is constant for a share of the run, then falls (or rises) exponentially.

z = 0 has no gradient, so products with f need the open entries only; the expected L0 reads α of all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.gated import per_feature
from xlc_ray.dictionary.gates import Gate, Norms, Selected, at
from xlc_ray.dictionary.noise import key_of, uniform
from xlc_ray.dictionary.selection import Tile, Tiles, chosen
from xlc_ray.dictionary.shards import Pool, Shards
from xlc_ray.dictionary.sparse import Support


@dataclass(frozen=True)
class Shape:
    """γ = `low`, ζ = `high`; α's `start`; β, `last_beta`, and the share of the run for which the first one is held."""

    low: float
    high: float
    start: float
    beta: float
    last_beta: float
    hold: float


class Concrete(Gate):
    """What all have in common, given `logit`. Noise is a function of (seed, step, pass, group, token of the global
    batch, feature), so that it does not depend on how features and tokens are split, nor on the form of products."""

    def __init__(self, sizes: list[int], shards: Shards, shape: Shape):
        super().__init__(sizes, shards)
        self.shape, self.beta = shape, shape.beta
        self.seed, self.first, self.place = 0, [0] * len(sizes), (0, 0)

    def initialise(self, seed: int, first: list[int], encoders: list[tuple[Tensor, Tensor]]) -> None:
        self.seed, self.first = seed, first

    def start_step(self, step: int, steps: int) -> None:
        """Set β: the first value for the share `hold` of the run, then exponentially to the last one."""
        held = round(self.shape.hold * steps)
        done = max(0, step - held) / max(1, steps - 1 - held)
        self.beta = self.shape.beta * (self.shape.last_beta / self.shape.beta) ** done
        self.place = (step, 0)

    def start_pass(self) -> None:
        self.place = (self.place[0], self.place[1] + 1)

    # ------------------------------------------------------------ the gate

    @abstractmethod
    def logit(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """α, of the shape of pre."""

    def select(self, tiles: Tiles, norms: Norms, most: float, extra: list[Pool]) -> Selected:
        def is_open(tile: Tile) -> Tensor:
            alpha = self.logit(tile.pre, tile.g, None)
            if not self.training:
                return alpha > self._limit()
            token = torch.arange(tile.first, tile.first + alpha.shape[0], device=alpha.device).unsqueeze(1)
            return alpha + self._noise(tile.g, token, None, tile.tokens, alpha) > self.beta * self._limit()

        return chosen(tiles, is_open, most), self.shards.kth_largest(extra) if extra else []

    def openness(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """z."""
        alpha = self.logit(pre, g, support)
        if self.training:
            tokens = support.shape[0] if support else alpha.shape[0]
            token = support.token if support else torch.arange(tokens, device=alpha.device).unsqueeze(1)
            noise = self._noise(g, token, support.feature if support else None, tokens, alpha)
            alpha = (alpha + noise) / self.beta
        low, high = self.shape.low, self.shape.high
        return (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)

    def _limit(self) -> float:
        """log(-γ/ζ): what α/β must exceed for z > 0."""
        return math.log(-self.shape.low / self.shape.high)

    @torch.no_grad()
    def _noise(self, g: int, token: Tensor, feature: Tensor | None, tokens: int, like: Tensor) -> Tensor:
        """logit u at tokens of this replica's batch and features of this rank; `feature` None: all of them."""
        if feature is None:
            feature = torch.arange(self.sizes[g], device=like.device)
        u = uniform(
            key_of(self.seed, *self.place, g), token + self.shards.replica * tokens, feature + self.first[g], like.dtype
        )
        return torch.logit(u)


class HardConcrete(Concrete):
    """f = z · m, m with a sign; α from the input, or free (see the module)."""

    alpha: Sequence[nn.Parameter]
    W_mag: Sequence[nn.Parameter]
    b_mag: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards, shape: Shape, by_input: bool):
        super().__init__(sizes, shards, shape)
        self.by_input = self.counts_all = by_input
        if by_input:
            self.W_mag = nn.ParameterList()  # pyrefly: ignore (filled below)
            self.b_mag = per_feature(sizes, 0.0)  # pyrefly: ignore (a sequence of just these)
        else:
            self.alpha = per_feature(sizes, shape.start)  # pyrefly: ignore (likewise)

    @torch.no_grad()
    def initialise(self, seed: int, first: list[int], encoders: list[tuple[Tensor, Tensor]]) -> None:
        """Magnitudes start with the encoder's rows: a feature opens where it is strong."""
        super().initialise(seed, first, encoders)
        if self.by_input:
            self.W_mag = nn.ParameterList(  # pyrefly: ignore (a sequence of just these)
                [nn.Parameter(W.detach().clone()) for W, _ in encoders]
            )
            for _, bias in encoders:
                bias.fill_(self.shape.start)

    def logit(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        return pre if self.by_input else at(self.alpha[g], support).expand_as(pre)

    def magnitude(self, g: int) -> tuple[Tensor, Tensor] | None:
        return (self.W_mag[g], self.b_mag[g]) if self.by_input else None

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        z = self.openness(pre, g, support)
        return z if self.by_input else z * pre

    def count(self, features: list[Features], pre: list[Tensor] | None) -> Tensor:
        if not self.by_input:
            open_ = [torch.sigmoid(alpha - self.beta * self._limit()).sum() for alpha in self.alpha]
            return torch.stack(open_).sum()
        assert pre is not None
        return _expected(pre, self.beta * self._limit())


class GatedHardConcrete(Concrete):
    """f = z · ReLU(e^r ⊙ pre + b_mag), α = pre + b_gate (see the module). `auxiliary` = a."""

    counts_all = True
    b_gate: Sequence[nn.Parameter]
    r_mag: Sequence[nn.Parameter]
    b_mag: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards, shape: Shape, auxiliary: float):
        super().__init__(sizes, shards, shape)
        self.auxiliary = auxiliary
        for name, start in (("b_gate", shape.start), ("r_mag", 0.0), ("b_mag", 0.0)):
            setattr(self, name, per_feature(sizes, start))

    def logit(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        return pre + at(self.b_gate[g], support)

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        strength = torch.relu(at(self.r_mag[g].exp(), support) * pre + at(self.b_mag[g], support))
        return self.openness(pre, g, support) * strength

    def auxiliary_values(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """z."""
        return self.openness(pre, g, support)

    def count(self, features: list[Features], pre: list[Tensor] | None) -> Tensor:
        assert pre is not None
        return _expected([self.logit(p, g, None) for g, p in enumerate(pre)], self.beta * self._limit())


def _expected(alpha: list[Tensor], bound: float) -> Tensor:
    """(1/B) Σ σ(α - bound)."""
    return torch.stack([torch.sigmoid(a - bound).sum() for a in alpha]).sum() / alpha[0].shape[0]
