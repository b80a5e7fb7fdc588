"""Sparse connections to another dictionary: a penalty on what its decoder rows and ours have in common.

    Σ_s (1/F'_s) Σ_j Σ_i |⟨d'_js, d_is⟩|        s: sites that both write; d'_js, j ≤ F'_s: the other's rows at s

with d_is our rows, both in this dictionary's units. Every pair of features with directions in common adds to it, so
that circuits through the two become sparse.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.dictionary.dictionary import Dictionary

TILE = 2**23  # inner products held at a time


def others(dictionary: Dictionary, run_dir: str) -> dict[str, Float[Tensor, "F d"]]:
    """Decoder rows of a run's newest checkpoint at each site that both write, in this dictionary's units.

    Every rank holds them whole. Raises UserError where no site is common, or one differs in width."""
    other, _ = load_dictionary(run_dir)
    common = [site for site in dictionary.wiring.written_sites if site in other.wiring.written_sites]
    if not common:
        raise UserError(
            f"train.loss.connection.run: {run_dir} writes {', '.join(other.wiring.written_sites)}, of which this "
            f"dictionary writes none; allowed: {', '.join(dictionary.wiring.written_sites)}"
        )
    return {site: _rows(dictionary, other, site, run_dir) for site in common}


@torch.no_grad()
def _rows(dictionary: Dictionary, other: Dictionary, site: str, run_dir: str) -> Float[Tensor, "F d"]:
    theirs, ours = (d.wiring.widths[site] for d in (other, dictionary))
    if theirs != ours:
        raise UserError(f"train.loss.connection.run: {run_dir} has {site} of width {theirs}, this dictionary of {ours}")
    units, mine = (d.write_scale[d.wiring.columns(d.wiring.written_sites)[site]] for d in (other, dictionary))
    writers = [g for g, sites in enumerate(other.wiring.writes) if site in sites]
    rows = torch.cat([other.decoder_rows(g, site) for g in writers]) * units
    return rows.to(mine) / mine


def overlap(dictionary: Dictionary, rows: dict[str, Float[Tensor, "F d"]]) -> Float[Tensor, ""]:
    """The penalty over this rank's features; `rows` as from `others`."""
    terms = []
    for g, sites in enumerate(dictionary.wiring.writes):
        for site in sites:
            if site in rows:
                terms.append(_Overlap.apply(dictionary.decoder_rows(g, site), rows[site]))
    return torch.stack(terms).sum()


class _Overlap(torch.autograd.Function):
    """(1/F') Σ_ij |⟨d_i, d'_j⟩|, whose gradient (1/F') Σ_j sign⟨d_i, d'_j⟩ d'_j is made in the same pass over tiles."""

    @staticmethod
    def forward(ctx, ours, theirs):
        value, gradient = ours.new_zeros(()), torch.zeros_like(ours)
        for tile in theirs.split(max(1, TILE // max(1, ours.shape[0]))):
            products = ours @ tile.T
            value += products.abs().sum()
            gradient.addmm_(products.sign_(), tile)
        ctx.save_for_backward(gradient.div_(theirs.shape[0]))
        return value / theirs.shape[0]

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None
