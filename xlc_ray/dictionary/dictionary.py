"""The dictionary: groups of features, wired to sites, made sparse by a gate.

    x, y      normalised activations of the sites read [B, R] and written [B, W], side by side
    pre_g     = x_g W_enc_gᵀ + b_enc_g                       x_g: the columns that group g reads
    f         = gate(pre)
    ŷ         = Σ_g f_g W_dec_g (in the columns group g writes) + b_dec (+ x_g W_skip_gᵀ)

Shapes: B tokens, F features of a group on this rank, R / W summed width of sites read / written, d the width of a site
(_ in mappings, whose sites may differ in width).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlc_ray.dictionary import tied
from xlc_ray.dictionary.columns import AddColumns, columns, join
from xlc_ray.dictionary.features import Chosen, Features
from xlc_ray.dictionary.gates import Gate, Selected
from xlc_ray.dictionary.groups import FeatureGroup
from xlc_ray.dictionary.nested import Cuts, decode_parts
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


class Dictionary(nn.Module):
    """A sparse dictionary. `sizes[g]`: features of group g over all ranks."""

    groups: Sequence[FeatureGroup]
    W_skip: Sequence[nn.Parameter]
    read_mean: Tensor
    read_scale: Tensor
    write_mean: Tensor
    write_scale: Tensor

    def __init__(self, wiring: Wiring, sizes: list[int], gate: Gate, shards: Shards, products: str):
        super().__init__()
        self.wiring, self.sizes, self.gate, self.shards, self.products = wiring, sizes, gate, shards, products
        self.matmul_dtype: torch.dtype | None = None  # bfloat16: dense products under autocast
        self.groups = nn.ModuleList(  # pyrefly: ignore (a sequence of just these)
            FeatureGroup(hi - lo, wiring.width(wiring.reads[g]), wiring.decoder_width(g), wiring.tied)
            for g, (lo, hi) in enumerate(shards.bounds(n) for n in sizes)
        )
        read, written = wiring.width(wiring.read_sites), wiring.width(wiring.written_sites)
        self.b_dec = nn.Parameter(torch.zeros(written))
        self.W_skip = nn.ParameterList(  # pyrefly: ignore (likewise)
            nn.Parameter(torch.zeros(wiring.width(w), wiring.width(r)))
            for r, w in zip(wiring.reads, wiring.writes, strict=True)
            if wiring.skip
        )
        self.register_buffer("read_mean", torch.zeros(read))
        self.register_buffer("read_scale", torch.ones(read))
        self.register_buffer("write_mean", torch.zeros(written))
        self.register_buffer("write_scale", torch.ones(written))
        self._reads = [wiring.read_spans(g) for g in range(wiring.groups)]
        self._writes = [wiring.write_spans(g) for g in range(wiring.groups)]

    def is_sharded(self, name: str) -> bool:
        """Whether a parameter (by its name) is split over the ranks of a replica by its first dimension."""
        return name.startswith(("groups.", "gate."))

    def norms(self, g: int) -> Float[Tensor, "F"]:
        """n_i: norm of each feature's whole decoder row, over all sites that group g writes."""
        return tied.norms(self.wiring, self.groups, g) if self.wiring.tied else self.groups[g].norms()

    def decoder_rows(self, g: int, site: str) -> Float[Tensor, "F d"]:
        """What the features of group g write at one of its sites, in the dictionary's units."""
        if self.wiring.tied:
            return tied.rows(self.wiring, self.groups, g, site)
        return self.groups[g].W_dec[:, self.wiring.columns(self.wiring.writes[g])[site]]

    # ------------------------------------------------------------ units

    def normalize_inputs(self, activations: Mapping[str, Float[Tensor, "B _"]]) -> Float[Tensor, "B R"]:
        """x: the sites read, side by side, in the dictionary's units."""
        return (join(activations, self.wiring.read_sites, self.b_dec) - self.read_mean) / self.read_scale

    def normalize_targets(self, activations: Mapping[str, Float[Tensor, "B _"]]) -> Float[Tensor, "B W"]:
        """y: the sites written, side by side, in the dictionary's units."""
        return (join(activations, self.wiring.written_sites, self.b_dec) - self.write_mean) / self.write_scale

    def denormalize(self, y: Float[Tensor, "B W"]) -> dict[str, Float[Tensor, "B _"]]:
        """Written sites in the model's own units."""
        raw = y * self.write_scale + self.write_mean
        return {site: raw[:, cols] for site, cols in self.wiring.columns(self.wiring.written_sites).items()}

    # ------------------------------------------------------------ encode, decode

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
        picked, limits = self._select(x, lengths, list(pools.values()))
        features = [self._features(g, x, picked[g], whole) for g in every]
        revived = None
        if dead and dead.k is None:
            revived = [self._ghosts(g, x, dead.masks[g]) for g in every]
        elif dead:
            allowed = dict(zip(pools, limits, strict=True))
            revived = [self._revive(g, x, rivals[g], dead.masks[g], allowed.get(g)) for g in every]
        return Encoding(features, whole, lengths, revived)

    def decode(self, features: list[Features], x: Float[Tensor, "B R"]) -> Float[Tensor, "B W"]:
        """ŷ in the dictionary's units. `x` is used by skip connections only."""
        return self.decode_all([features], x)[0][0]

    def decode_all(
        self,
        codes: Sequence[Sequence[Features]],
        x: Float[Tensor, "B R"],
        norms: list[Tensor] | None = None,
        cuts: Cuts | None = None,
        frozen: Sequence[Sequence[Features]] = (),
    ) -> tuple[list[Float[Tensor, "B W"]], list[Tensor] | None]:
        """Σ_g f_g W_dec_g of each code, then of each `frozen` one (the decoder without gradient), with one all-reduce.

        The offset is added to the first only. With `cuts` (nested.py) the first code gives one reconstruction a prefix,
        of which the last is the whole.

        Also the decoder norms of an `Encoding`, now with gradient, which is computed together with that of the first
        code: a penalty on norms then takes no pass of its own over the weights and their gradient."""
        first, norms = self._partial(codes[0], norms, cuts)
        parts = [first, *(self._partial(code)[0] for code in codes[1:])]
        parts += [self._partial(code, frozen=True)[0] for code in frozen]
        whole = self.shards.sum(torch.cat(parts) if len(parts) > 1 else first)
        count = len(cuts[0]) if cuts else 1
        each = whole.view(count + len(parts) - 1, x.shape[0], whole.shape[1])
        prefixes = each[:count].cumsum(dim=0) if count > 1 else each[:1]
        offset = self.offset(x)
        return [*(prefix + offset for prefix in prefixes), *each[count:]], norms

    def offset(self, x: Float[Tensor, "B R"]) -> Tensor:
        """What is added to the features' part: b_dec [W], and with skip connections x W_skipᵀ [B, W]."""
        if not self.wiring.skip:
            return self.b_dec
        linear = [nnf.linear(columns(x, self._reads[g]), W) for g, W in enumerate(self.W_skip)]
        return self.b_dec + AddColumns.apply(self.b_dec.shape[0], self._writes, *linear)

    def reconstruct(self, activations: Mapping[str, Float[Tensor, "B _"]]) -> dict[str, Float[Tensor, "B _"]]:
        """Written sites from read ones, both in the model's own units."""
        x = self.normalize_inputs(activations)
        return self.denormalize(self.decode(self.encode(x), x))

    # ------------------------------------------------------------ one group, one site (replacement model)

    def encode_group(self, g: int, activations: Mapping[str, Float[Tensor, "B _"]]) -> Features:
        """Features of one group from its own read sites alone, in inference form (whole dictionaries only)."""
        assert not self.training
        sites = self.wiring.reads[g]
        places = self.wiring.columns(self.wiring.read_sites)
        raw = join(activations, sites, self.b_dec)
        mean, scale = (torch.cat([v[places[s]] for s in sites]) for v in (self.read_mean, self.read_scale))
        x, group = (raw - mean) / scale, self.groups[g]
        norms = [self.norms(n).detach() for n in range(len(self.groups))] if self.gate.needs_norms else None
        pre = nnf.linear(x, group.W_enc, group.b_enc)
        tile = Tile(g, 0, x.shape[0], pre.detach)
        picked = self.gate.select(lambda _: iter([tile]), norms, 1.0, [])[0][g]
        assert picked is not None
        support = Support(picked.entry, (pre.shape[0], pre.shape[1]))
        values = self._values(g, x, pre.flatten()[picked.entry], support)
        return Features(support.dense(values), pre)

    def decode_site(
        self, site: str, features: Mapping[int, Features], activations: Mapping[str, Float[Tensor, "B _"]]
    ) -> Float[Tensor, "B d"]:
        """One written site in the model's own units, from the groups that write it; `activations`: for skips."""
        here = self.wiring.columns(self.wiring.written_sites)[site]
        out = self.b_dec[here]
        for g, sites in enumerate(self.wiring.writes):
            if site not in sites:
                continue
            own = self.wiring.columns(sites)[site]
            if self.wiring.tied:
                out = out + tied.decode_site(self.wiring, self.groups, g, site, features[g])
            else:
                out = out + features[g].decode(self.groups[g].W_dec[:, own])[0]
            if self.wiring.skip:
                read = self.wiring.columns(self.wiring.read_sites)[self.wiring.reads[g][0]]
                raw = join(activations, self.wiring.reads[g], self.b_dec)
                out = out + nnf.linear((raw - self.read_mean[read]) / self.read_scale[read], self.W_skip[g][own])
        return out * self.write_scale[here] + self.write_mean[here]

    # ------------------------------------------------------------ inside

    def _reduced_precision(self) -> torch.autocast:
        dtype = self.matmul_dtype or torch.bfloat16
        return torch.autocast(self.b_dec.device.type, dtype, enabled=self.matmul_dtype is not None)

    def _preactivations(self, g: int, x: Tensor) -> Tensor:
        group = self.groups[g]
        with self._reduced_precision():
            return nnf.linear(columns(x, self._reads[g]), group.W_enc, group.b_enc).to(group.W_enc.dtype)

    @torch.no_grad()
    def _select(self, x: Tensor, lengths: list[Tensor] | None, extra: list[Pool]) -> Selected:
        """Entries of each group, chosen from tiles of pre-activations; [B, F] of all groups is never held."""
        if self.products == "dense" and not self.gate.ranks:
            limits = self.shards.kth_largest(extra) if extra else []
            return dict.fromkeys(range(self.wiring.groups)), limits
        most = 1.0 if self.products == "sparse" else BREAK_EVEN
        return self.gate.select(functools.partial(self._tiles, x), lengths, most, extra)

    def _tiles(self, x: Tensor, together: bool) -> Iterator[Tile]:
        """Tiles of at most TILE entries: of all groups for a block of tokens, or of one group. Each is made in the
        memory of one before it, because paging in fresh memory takes a quarter of the time of the product."""
        memory: dict[int, Tensor] = {}
        sizes = [group.b_enc.shape[0] for group in self.groups]
        blocks = [range(len(sizes))] if together else [[g] for g in range(len(sizes))]
        for groups in blocks:
            rows = max(1, TILE // sum(sizes[g] for g in groups))
            for first in range(0, max(1, x.shape[0]), rows):  # without tokens: one empty tile
                for g in groups:
                    place = g if together else 0
                    make = functools.partial(self._tile, g, x[first : first + rows], memory, place)
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

    def _partial(
        self,
        features: Sequence[Features],
        norms: list[Tensor] | None = None,
        cuts: Cuts | None = None,
        frozen: bool = False,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """What this rank's features add to ŷ, and the norms with gradient if given."""
        groups = [group.frozen() if frozen else group for group in self.groups]
        width, none = self.b_dec.shape[0], [None] * len(features)
        if self.wiring.tied:
            with self._reduced_precision():
                spans, outs = tied.decode(self.wiring, groups, features, cuts or none)
            lengths = [self.norms(g) for g in range(len(features))] if norms else None
            return AddColumns.apply(width, spans, *outs), lengths
        each = zip(features, groups, cuts or none, norms or none, strict=True)
        with self._reduced_precision():
            made = [decode_parts(f, group.W_dec, stops, n) for f, group, stops, n in each]
        whole = AddColumns.apply(width, self._writes, *[y for y, _ in made])
        return whole, [n for _, n in made if n is not None] if norms else None
