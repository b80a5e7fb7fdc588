"""Architecture as data: which sites of a model each group of features reads and writes.

    x_g = [a_s for s in reads[g]]            what group g reads, concatenated
    ŷ_s = Σ_{g : s in writes[g]} f_g W_dec_g[:, s] + b_dec_s

An SAE, a transcoder, a CLT and a crosscoder differ in these two tables and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from xlc_ray.config import UserError

Sites = tuple[str, ...]
Spans = tuple[slice, ...]


@dataclass(frozen=True)
class Tying:
    """Which decoders are one and the same (tied.py): `by` source group or by target site; and whether each target has
    its own scale and offset of every feature."""

    by: Literal["per_source", "per_target"]
    scale: bool
    offset: bool


@dataclass(frozen=True)
class Wiring:
    """Sites with their widths, and a row of read and of written sites for each feature group.

    `skip` adds a linear path from what a group reads (one site) to what it writes. `tied` makes groups or sites share
    decoders: then group t belongs to written site t, and all written sites are of one width.
    """

    widths: Mapping[str, int]
    reads: tuple[Sites, ...]
    writes: tuple[Sites, ...]
    skip: bool = False
    tied: Tying | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", MappingProxyType(dict(self.widths)))
        if len(self.reads) != len(self.writes) or not self.reads:
            raise ValueError(f"{len(self.reads)} rows of read sites, {len(self.writes)} of written ones")
        for name, rows in (("reads", self.reads), ("writes", self.writes)):
            for g, row in enumerate(rows):
                if not row or len(set(row)) != len(row):
                    raise ValueError(f"{name}[{g}] must name one or more distinct sites, not {row}")
                if unknown := [s for s in row if s not in self.widths]:
                    raise ValueError(f"{name}[{g}]: no width for {unknown[0]}")
        if self.skip and any(len(r) != 1 for r in self.reads):
            raise ValueError("a skip connection needs one read site a group")
        if self.tied and (
            self.groups != len(self.written_sites) or len({self.widths[s] for s in self.written_sites}) > 1
        ):
            raise ValueError("tied decoders need as many groups as written sites, and those of one width")

    def __reduce__(self):  # a mapping proxy does not pickle
        return Wiring, (dict(self.widths), self.reads, self.writes, self.skip, self.tied)

    @property
    def groups(self) -> int:
        """Number of feature groups."""
        return len(self.reads)

    @property
    def read_sites(self) -> Sites:
        """All sites read, in the order of the columns of x."""
        return _ordered(self.widths, self.reads)

    @property
    def written_sites(self) -> Sites:
        """All sites written, in the order of the columns of y."""
        return _ordered(self.widths, self.writes)

    @property
    def sites(self) -> Sites:
        """All sites read or written."""
        return _ordered(self.widths, self.reads + self.writes)

    def columns(self, order: Sites) -> dict[str, slice]:
        """Columns of each site where the sites of `order` stand side by side."""
        found, start = {}, 0
        for site in order:
            found[site] = slice(start, start + self.widths[site])
            start += self.widths[site]
        return found

    def width(self, sites: Sites) -> int:
        """Summed width of some sites."""
        return sum(self.widths[s] for s in sites)

    @property
    def parts(self) -> tuple[tuple[Spans, tuple[int, ...]], ...]:
        """Dictionaries of their own: columns of y, and the groups that write there and nowhere else. In the order of
        columns. An SAE or a transcoder has one for each group; a CLT or a crosscoder is one."""
        found: list[tuple[set[str], list[int]]] = []
        for g, row in enumerate(self.writes):
            shared = [part for part in found if not part[0].isdisjoint(row)]
            found = [part for part in found if part not in shared]
            found.append((set(row).union(*(s for s, _ in shared)), sorted(sum((n for _, n in shared), [g]))))
        places = self.columns(self.written_sites)
        parts = [(_spans(places, tuple(s for s in places if s in own)), tuple(groups)) for own, groups in found]
        return tuple(sorted(parts, key=lambda part: part[0][0].start))

    def decoder_width(self, g: int) -> int:
        """Columns of the decoder that group g stores."""
        return self.widths[self.written_sites[g]] if self.tied else self.width(self.writes[g])

    def read_spans(self, g: int) -> Spans:
        """Columns of x that group g reads: as few slices as possible."""
        return _spans(self.columns(self.read_sites), self.reads[g])

    def write_spans(self, g: int) -> Spans:
        """Columns of y that group g writes: as few slices as possible (one for every wiring made here)."""
        return _spans(self.columns(self.written_sites), self.writes[g])


def _ordered(widths: Mapping[str, int], rows: Sequence[Sites]) -> Sites:
    used = {site for row in rows for site in row}
    return tuple(site for site in widths if site in used)


def _spans(columns: dict[str, slice], sites: Sites) -> Spans:
    spans: list[slice] = []
    for site in sites:
        here = columns[site]
        if spans and spans[-1].stop == here.start:
            spans[-1] = slice(spans[-1].start, here.stop)
        else:
            spans.append(here)
    return tuple(spans)


def sae(sites: Sequence[str], width: int) -> Wiring:
    """One group a site, which it reads and writes."""
    rows = tuple((s,) for s in sites)
    return Wiring(dict.fromkeys(sites, width), rows, rows)


def transcoders(layers: Sequence[int], width: int, skip: bool) -> Wiring:
    """Group l reads the MLP input of its layer and writes that layer's MLP output."""
    ins, outs = tuple(f"mlp_in.{n}" for n in layers), tuple(f"mlp_out.{n}" for n in layers)
    return Wiring(dict.fromkeys(ins + outs, width), tuple((s,) for s in ins), tuple((s,) for s in outs), skip)


def clt(layers: Sequence[int], width: int) -> Wiring:
    """Group l reads the MLP input of its layer and writes the MLP outputs of that layer and all later ones."""
    ins, outs = tuple(f"mlp_in.{n}" for n in layers), tuple(f"mlp_out.{n}" for n in layers)
    return Wiring(dict.fromkeys(ins + outs, width), tuple((s,) for s in ins), tuple(outs[i:] for i in range(len(outs))))


def model_diff(site: str, width: int, base_width: int) -> Wiring:
    """One group reads and writes a site of a model, and the same site of the model that it was fine-tuned from."""
    both = (site, f"{site}@base")
    return Wiring({both[0]: width, both[1]: base_width}, (both,), (both,))


def crosscoder(sites: Sequence[str], width: int, causality: str) -> Wiring:
    """acausal: one group reads and writes all sites; weak: group l writes sites ≥ l; strict: sites > l."""
    sites = tuple(sites)
    widths = dict.fromkeys(sites, width)
    if causality == "acausal":
        return Wiring(widths, (sites,), (sites,))
    if causality == "weak":
        return Wiring(widths, tuple((s,) for s in sites), tuple(sites[i:] for i in range(len(sites))))
    if len(sites) < 2:
        raise UserError("dictionary.wiring: a strictly causal crosscoder needs at least two layers")
    return Wiring(widths, tuple((s,) for s in sites[:-1]), tuple(sites[i + 1 :] for i in range(len(sites) - 1)))
