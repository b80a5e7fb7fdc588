"""From normalised inputs to features: pre-activations in tiles, selection by the gate, values where it selected.

    pre_g     = x_g W_enc_gᵀ + b_enc_g                       x_g: the columns that group g reads
    f         = gate(pre)

Shapes: B tokens, F features of a group on this rank, R summed width of the sites read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlc_ray.dictionary import tied
from xlc_ray.dictionary.columns import columns
from xlc_ray.dictionary.features import Chosen, Features
from xlc_ray.dictionary.gates import Gate, Selected
from xlc_ray.dictionary.groups import FeatureGroup
from xlc_ray.dictionary.selection import LEAST, Picked, Tile, cut, positions, take
from xlc_ray.dictionary.shards import Limit, Pool, Shards
from xlc_ray.dictionary.sparse import BREAK_EVEN, Support, encode_at, linear_at, sparse_pays
from xlc_ray.dictionary.wiring import Wiring

GHOST = 30.0  # dead pre-activations beyond this no longer grow under exp, which would overflow
TILE = 2**23  # pre-activations in a tile: 32 MB


@dataclass(frozen=True)
class DeadFeatures:
    """`masks[g]` [F]: this rank's dead features; `totals[g]`: those of all ranks; `k`: at most so many are used with
    max(pre, 0) (AuxK), or None: all are, with exp(pre) (ghost gradients)."""

    masks: list[Bool[Tensor, "F"]]
    totals: list[int]
    k: int | None


@dataclass(frozen=True)
class Encoding:
    """What encoding a batch gives: features, and where asked for all pre-activations [B, F] (with gradient), decoder
    norms (without: `decode_all` adds it), and the dead features' own activations for AuxK or ghost gradients."""

    features: list[Features]
    pre: list[Tensor] | None
    norms: list[Tensor] | None
    revived: Sequence[Features] | None


class Encoder(nn.Module):
    """The groups and the gate of a dictionary. `sizes[g]`: features of group g over all ranks."""

    groups: Sequence[FeatureGroup]

    def __init__(self, wiring: Wiring, sizes: list[int], gate: Gate, shards: Shards, products: str):
        super().__init__()
        self.wiring, self.sizes, self.gate, self.shards, self.products = wiring, sizes, gate, shards, products
        self.matmul_dtype: torch.dtype | None = None  # bfloat16: dense products under autocast
        self.groups = nn.ModuleList(  # pyrefly: ignore (a sequence of just these)
            FeatureGroup(hi - lo, wiring.width(wiring.reads[g]), wiring.decoder_width(g), wiring.tied)
            for g, (lo, hi) in enumerate(shards.bounds(n) for n in sizes)
        )
        self._reads = [wiring.read_spans(g) for g in range(wiring.groups)]

    def norms(self, g: int) -> Float[Tensor, "F"]:
        """n_i: norm of each feature's whole decoder row, over all sites that group g writes."""
        return tied.norms(self.wiring, self.groups, g) if self.wiring.tied else self.groups[g].norms()

    def encode(self, x: Float[Tensor, "B R"]) -> list[Features]:
        """Features of each group."""
        return self.analyse(x).features

    def analyse(
        self, x: Float[Tensor, "B R"], dead: DeadFeatures | None = None, norms: bool = False, pre: bool = False
    ) -> Encoding:
        """Features, and on demand what the loss needs besides. One small collective at most, as a rule."""
        if self.training:
            self.gate.start_pass()
        wanted = norms or self.gate.needs_norms
        with torch.no_grad():
            lengths = [self.norms(g) for g in range(self.wiring.groups)] if wanted else None
        every = range(self.wiring.groups)
        whole = [self._preactivations(g, x) for g in every] if pre else None
        rivals, pools = {}, {}
        if dead and dead.k is not None:
            rivals = {g: self._dead_preactivations(g, x, dead.masks[g]) for g in every}
            pools = {g: Pool(rivals[g], dead.k) for g in every if dead.totals[g] > dead.k}
        picked, limits = self._select(x, whole, lengths, list(pools.values()))
        features = [self._features(g, x, picked[g], whole) for g in every]
        revived = None
        if dead and dead.k is None:
            revived = [self._ghosts(g, x, dead.masks[g]) for g in every]
        elif dead:
            allowed = dict(zip(pools, limits, strict=True))
            revived = [self._revive(g, x, rivals[g], dead.masks[g], allowed.get(g)) for g in every]
        return Encoding(features, whole, lengths, revived)

    # ------------------------------------------------------------ inside

    def _reduced_precision(self) -> torch.autocast:
        dtype = self.matmul_dtype or torch.bfloat16
        return torch.autocast(self.groups[0].W_enc.device.type, dtype, enabled=self.matmul_dtype is not None)

    def _preactivations(self, g: int, x: Tensor) -> Tensor:
        group = self.groups[g]
        with self._reduced_precision():
            return nnf.linear(columns(x, self._reads[g]), group.W_enc, group.b_enc).to(group.W_enc.dtype)

    @torch.no_grad()
    def _select(
        self, x: Tensor, whole: list[Tensor] | None, lengths: list[Tensor] | None, extra: list[Pool]
    ) -> Selected:
        """Entries of each group, chosen from tiles: of `whole`, or made so that [B, F] of all groups is never held."""
        if self.products == "dense" and not self.gate.ranks:
            limits = self.shards.kth_largest(extra) if extra else []
            return dict.fromkeys(range(self.wiring.groups)), limits
        most = 1.0 if self.products == "sparse" else BREAK_EVEN
        with self._reduced_precision():  # around all tiles: autocast keeps its copy of the weights until it ends
            return self.gate.select(functools.partial(self._tiles, x, whole), lengths, most, extra)

    def _tiles(self, x: Tensor, whole: list[Tensor] | None, together: bool) -> Iterator[Tile]:
        """Tiles of at most TILE entries: of all groups for a block of tokens, or of one group. They are rows of
        `whole`, or each is made in the memory of one before it, because paging in fresh memory takes a quarter of the
        time of the product."""
        memory: dict[int, Tensor] = {}
        sizes = [group.b_enc.shape[0] for group in self.groups]
        blocks = [range(len(sizes))] if together else [[g] for g in range(len(sizes))]
        for groups in blocks:
            rows = max(1, TILE // sum(sizes[g] for g in groups))
            for first in range(0, max(1, x.shape[0]), rows):  # without tokens: one empty tile
                part = slice(first, first + rows)
                for g in groups:
                    if whole:
                        make = functools.partial(whole[g].detach().__getitem__, part)
                    else:
                        make = functools.partial(self._tile, g, x[part], memory, g if together else 0)
                    yield Tile(g, first, x.shape[0], make)

    def _tile(self, g: int, x: Tensor, memory: dict[int, Tensor], place: int) -> Tensor:
        """`_preactivations` without gradient, in the memory kept at a place."""
        group = self.groups[g]
        if self.matmul_dtype is not None:  # autocast does not write into given memory
            return self._preactivations(g, x)
        size = x.shape[0] * group.b_enc.shape[0]
        if place not in memory or memory[place].numel() < size:
            memory[place] = group.b_enc.new_empty(size)
        out = memory[place][:size].view(x.shape[0], group.b_enc.shape[0])
        return torch.addmm(group.b_enc, columns(x, self._reads[g]), group.W_enc.T, out=out)

    def _features(self, g: int, x: Tensor, picked: Picked | None, whole: list[Tensor] | None) -> Features:
        entries = x.shape[0] * self.groups[g].b_enc.shape[0]
        if picked is not None and sparse_pays(self.products, picked.entry.numel(), entries, x.device):
            support, pre = self._entries(g, x, picked.entry, picked.pre)
            return Features(self._values(g, columns(x, self._reads[g]), pre, support), pre, support)
        pre = whole[g] if whole else self._preactivations(g, x)
        if not self.gate.ranks:
            return Features(self._values(g, columns(x, self._reads[g]), pre, None), pre)
        assert picked is not None
        mask = torch.zeros_like(pre, dtype=torch.bool)
        mask.view(-1)[picked.entry] = True
        return Features(pre.where(mask, 0), pre)

    def _values(self, g: int, own: Tensor, pre: Tensor, support: Support | None) -> Tensor:
        """f at all entries or at those of a support; `own`: the columns of x that group g reads."""
        values = self.gate.activate(pre, g, support)
        if (second := self.gate.magnitude(g)) is None:
            return values
        if support:
            return values * linear_at(own, *second, support)
        with self._reduced_precision():
            return values * nnf.linear(own, *second).to(values.dtype)

    def _entries(self, g: int, x: Tensor, entry: Tensor, pre: Tensor) -> tuple[Support, Tensor]:
        """The support of some entries, and the pre-activations there with gradient."""
        group = self.groups[g]
        support = Support(entry, (x.shape[0], group.b_enc.shape[0]))
        return support, encode_at(columns(x, self._reads[g]), group.W_enc, group.b_enc, support, pre)

    @torch.no_grad()
    def _dead_preactivations(self, g: int, x: Tensor, dead: Tensor) -> Tensor:
        """[B, dead features of this rank]."""
        group = self.groups[g]
        return nnf.linear(columns(x, self._reads[g]), group.W_enc[dead], group.b_enc[dead])

    def _revive(self, g: int, x: Tensor, rivals: Tensor, dead: Tensor, limit: Limit | None) -> Features:
        """Activations max(pre, 0) of dead features, within the limit if there is one."""
        tile = Tile(g, 0, x.shape[0], lambda: rivals)
        picked = {g: take(tile, rivals, rivals >= (LEAST if limit is None else limit.value))}
        if limit is not None:
            cut(picked, [g], limit, by_token=True)
        found, own = picked[g], max(1, rivals.shape[1])
        entry = found.entry // own * dead.numel() + positions(dead)[found.entry % own]
        support, pre = self._entries(g, x, entry, found.pre)
        return Features(pre, pre, support)

    def _ghosts(self, g: int, x: Tensor, dead: Tensor) -> Chosen:
        """exp(pre) of dead features."""
        group, which = self.groups[g], positions(dead)
        pre = nnf.linear(columns(x, self._reads[g]), group.W_enc[which], group.b_enc[which])
        return Chosen(pre.clamp(max=GHOST).exp(), pre, which=which)
