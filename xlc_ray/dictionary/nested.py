"""Nested dictionaries (Matryoshka, Bussmann et al. 2025): each prefix of a group's features is a dictionary of its own.

    ŷ_m = Σ_g Σ_{i < m_g} f_i W_dec_i + bias          for growing prefixes m, the last of which is all features

Features stay in one order over all ranks, so a prefix ends within one rank's slice: ranks before it hold only features
that belong to it, ranks after it none. Every rank decodes the *parts* between the ends of prefixes that fall into its
slice, all ranks add their parts in one all-reduce, and running sums over parts give the prefixes. Each feature is
multiplied once, however many prefixes there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.sparse import Support

Cuts = list[list[int]]
"""For each group the ends of the parts within this rank's slice, ascending; the last is the slice's size."""


def ends(fraction: float, features: int) -> int:
    """Features in a prefix that is this share of a group: at least one."""
    return max(1, round(fraction * features))


def cuts(prefixes: Sequence[float], sizes: Sequence[int], shards: Shards) -> Cuts:
    """Where each prefix ends in this rank's slice of each group of `sizes` features in all."""
    found = []
    for n in sizes:
        first, last = shards.bounds(n)
        found.append([min(max(ends(p, n), first), last) - first for p in prefixes])
    return found


def decode_parts(
    f: Features, W_dec: Float[Tensor, "F W"], stops: list[int] | None, norms: Float[Tensor, "F"] | None = None
) -> tuple[Float[Tensor, "PB W"], Float[Tensor, "F"] | None]:
    """`Features.decode` of each part, one below the other: P parts of B tokens each. `stops` None: the whole."""
    if stops is None:
        return f.decode(W_dec, norms)
    if f.support is None:
        starts = [0, *stops[:-1]]
        y = torch.cat([f.values[:, a:b] @ W_dec[a:b] for a, b in zip(starts, stops, strict=True)])
        return y, None if norms is None else torch.linalg.vector_norm(W_dec, dim=1)
    return _by_part(f, f.support, stops).decode(W_dec, norms)


def _by_part(f: Features, support: Support, stops: list[int]) -> Features:
    """The same entries as features of P · B tokens, part after part: one product serves all parts."""
    tokens, width = support.shape
    ends_ = torch.tensor(stops, device=support.entry.device)
    part = torch.searchsorted(ends_, support.feature, right=True)
    entry, order = torch.sort(support.entry + part * (tokens * width))
    values, pre = f.values[order], f.pre[order]
    return Features(values, pre, Support(entry, (len(stops) * tokens, width)))
