"""The dictionary: groups of features, wired to sites, made sparse by a gate.

    x, y      normalised activations of the sites read [B, R] and written [B, W], side by side
    pre_g     = x_g W_enc_gᵀ + b_enc_g                       x_g: the columns that group g reads
    f         = gate(pre)
    ŷ         = Σ_g f_g W_dec_g (in the columns group g writes) + b_dec (+ x_g W_skip_gᵀ)

Shapes: B tokens, F features of a group on this rank, R / W summed width of sites read / written, d the width of a site
(_ in mappings, whose sites may differ in width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nnf
from jaxtyping import Float
from torch import Tensor, nn

from xlc_ray.dictionary import tied
from xlc_ray.dictionary.columns import AddColumns, columns, join
from xlc_ray.dictionary.encoding import Encoder
from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.gates import Gate
from xlc_ray.dictionary.nested import Cuts, decode_parts
from xlc_ray.dictionary.selection import Tile
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.sparse import Support
from xlc_ray.dictionary.wiring import Wiring


class Dictionary(Encoder):
    """A sparse dictionary. `sizes[g]`: features of group g over all ranks."""

    W_skip: Sequence[nn.Parameter]
    read_mean: Tensor
    read_scale: Tensor
    write_mean: Tensor
    write_scale: Tensor

    def __init__(self, wiring: Wiring, sizes: list[int], gate: Gate, shards: Shards, products: str):
        super().__init__(wiring, sizes, gate, shards, products)
        read, written = wiring.width(wiring.read_sites), wiring.width(wiring.written_sites)
        self.b_dec = nn.Parameter(torch.zeros(written))
        self.W_skip = nn.ParameterList(  # pyrefly: ignore (a sequence of just these)
            nn.Parameter(torch.zeros(wiring.width(w), wiring.width(r)))
            for r, w in zip(wiring.reads, wiring.writes, strict=True)
            if wiring.skip
        )
        self.register_buffer("read_mean", torch.zeros(read))
        self.register_buffer("read_scale", torch.ones(read))
        self.register_buffer("write_mean", torch.zeros(written))
        self.register_buffer("write_scale", torch.ones(written))
        self._writes = [wiring.write_spans(g) for g in range(wiring.groups)]

    def is_sharded(self, name: str) -> bool:
        """Whether a parameter (by its name) is split over the ranks of a replica by its first dimension."""
        return name.startswith(("groups.", "gate."))

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

    # ------------------------------------------------------------ decode

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
        norms = {g: self.norms(g).detach()} if self.gate.needs_norms else None
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
