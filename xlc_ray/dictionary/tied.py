"""Tied decoders: fewer weights, as many paths.

    ŷ_t = Σ_{g writes t} f_gt D + b_dec_t           D = W_dec_g (`per_source`) or W_dec_t (`per_target`)
    f_gt = (f_g + o_t) a_t where f_g ≠ 0, else 0    a, o [F]: scale and offset of each feature at target t, if there

`per_source`: a feature writes the same direction into every target. `per_target`: features of the same number in
different groups write the same direction into a target. Target t is the t-th written site; its D, a and o are those of
group t, so that parameters have the shapes and the places of untied ones. Decoder rows, wherever their norms count, are
those of the untied dictionary that computes the same without offsets: a_t D, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.groups import FeatureGroup
from xlc_ray.dictionary.nested import decode_parts
from xlc_ray.dictionary.wiring import Spans, Wiring

if TYPE_CHECKING:
    Groups = Sequence[FeatureGroup]
else:
    Groups = Iterable  # a ModuleList, which Python does not call a Sequence


def rows(wiring: Wiring, groups: Groups, g: int, site: str) -> Float[Tensor, "F d"]:
    """What the features of group g write at a site: a_t D."""
    owner, target = _places(wiring, groups, g, site)
    return owner.W_dec if target.feature_scale is None else owner.W_dec * target.feature_scale.unsqueeze(1)


def norms(wiring: Wiring, groups: Groups, g: int) -> Float[Tensor, "F"]:
    """Norm of each feature's rows over all sites that group g writes. Its gradient where all are zero is zero."""
    found = []
    for site in wiring.writes[g]:
        owner, target = _places(wiring, groups, g, site)
        scale = target.feature_scale
        found.append(owner.norms() if scale is None else owner.norms() * scale.abs())
    return torch.linalg.vector_norm(torch.stack(found), dim=0)


def decode(
    wiring: Wiring, groups: Groups, code: Sequence[Features], cuts: Sequence[list[int] | None]
) -> tuple[list[Spans], list[Tensor]]:
    """The summands [B, d] of ŷ, and the columns of each: this rank's features only. `cuts`: of each group as for
    `nested.decode_parts`."""
    assert wiring.tied is not None
    columns = wiring.columns(wiring.written_sites)
    once = wiring.tied.by == "per_source" and not (wiring.tied.scale or wiring.tied.offset)
    spans, parts = [], []
    for g, (features, stops) in enumerate(zip(code, cuts, strict=True)):
        same = decode_parts(features, groups[g].W_dec, stops)[0] if once else None  # the same at every target
        for site in wiring.writes[g]:
            spans.append((columns[site],))
            parts.append(decode_site(wiring, groups, g, site, features, stops) if same is None else same)
    return spans, parts


def decode_site(
    wiring: Wiring, groups: Groups, g: int, site: str, features: Features, stops: list[int] | None = None
) -> Float[Tensor, "PB d"]:
    """What features of group g add to one site; with `stops` each part of them."""
    owner, target = _places(wiring, groups, g, site)
    return decode_parts(_at(features, target), owner.W_dec, stops)[0]


def _places(wiring: Wiring, groups: Groups, g: int, site: str) -> tuple[FeatureGroup, FeatureGroup]:
    """The groups that hold the decoder, and the scale and offset, of features of group g at a site."""
    assert wiring.tied is not None
    target = groups[wiring.written_sites.index(site)]
    return groups[g] if wiring.tied.by == "per_source" else target, target


def _at(features: Features, target: FeatureGroup) -> Features:
    """Features as a target sees them."""
    values = features.values
    if target.feature_offset is not None:
        # The step f ≠ 0 is data: a gate's own gradient at entries with f = 0 goes through the sum untouched.
        values = values + features.at(target.feature_offset) * (values != 0)
    if target.feature_scale is not None:
        values = values * features.at(target.feature_scale)
    return replace(features, values=values)
