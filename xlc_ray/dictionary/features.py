"""Features: what encoding gives, one of these a group. Dense, or its entries on a support; the mathematics never cares.

`values` are activations f, `pre` the pre-activations they came from: [B, F] where dense, [n] on the support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xlc_ray.dictionary import sparse
from xlc_ray.dictionary.selection import positions
from xlc_ray.dictionary.sparse import Support


@dataclass(frozen=True)
class Features:
    """Sparse features of B tokens in one group (of this rank's slice of it)."""

    values: Tensor
    pre: Tensor
    support: Support | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, features."""
        return self.support.shape if self.support else (self.values.shape[0], self.values.shape[1])

    def dense(self) -> Float[Tensor, "B F"]:
        """f as a matrix."""
        return self.support.dense(self.values) if self.support else self.values

    def decode(
        self, W_dec: Float[Tensor, "F W"], norms: Float[Tensor, "F"] | None = None
    ) -> tuple[Float[Tensor, "B W"], Float[Tensor, "F"] | None]:
        """f W_dec, and `norms`, those of its rows, with gradient if they are given (a zero row's is zero)."""
        if self.support:
            return sparse.decode(self.values, self.support, W_dec, norms)
        return self.values @ W_dec, None if norms is None else torch.linalg.vector_norm(W_dec, dim=1)

    def total(self, term: Callable[..., Tensor], *per_feature: Float[Tensor, "F"]) -> Float[Tensor, ""]:
        """Σ term(f, pre, *per_feature) over tokens and features; the term must vanish outside the support."""
        return term(self.values, self.pre, *map(self.at, per_feature)).sum()

    def at(self, per_feature: Float[Tensor, "F"]) -> Tensor:
        """A number of each feature, where `values` has its entries: [F] where dense, [n] on the support."""
        return per_feature[self.support.feature] if self.support else per_feature

    def l0(self) -> Int[Tensor, "B"]:
        """Active features of each token."""
        active = self.values != 0
        if self.support:
            return active.new_zeros(self.shape[0], dtype=torch.int64).index_add(0, self.support.token, active.long())
        return active.sum(dim=1)

    def count(self) -> Int[Tensor, "F"]:
        """Tokens on which each feature is active."""
        active = self.values != 0
        if self.support:
            return active.new_zeros(self.shape[1], dtype=torch.int64).index_add(0, self.support.feature, active.long())
        return active.sum(dim=0)

    def entries(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]:
        """Token, feature and f of every active entry (f ≠ 0), by token and then by feature."""
        if self.support:
            which = positions(self.values != 0)
            return self.support.token[which], self.support.feature[which], self.values[which]
        which = positions(self.values != 0)
        return which // self.shape[1], which % self.shape[1], self.values.flatten()[which]


@dataclass(frozen=True)
class Chosen(Features):
    """Features of which only some are computed, densely: `values`, `pre` [B, n] of the features `which` [n]."""

    which: Int[Tensor, "n"] = field(kw_only=True)

    def decode(
        self, W_dec: Float[Tensor, "F W"], norms: Float[Tensor, "F"] | None = None
    ) -> tuple[Float[Tensor, "B W"], Float[Tensor, "F"] | None]:
        """f W_dec over those features."""
        assert norms is None, "norms belong to the whole code"
        return self.values @ W_dec[self.which], None

    def at(self, per_feature: Float[Tensor, "F"]) -> Tensor:
        """A number of each of those features: [n]."""
        return per_feature[self.which]
