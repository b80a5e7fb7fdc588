"""Folding: the same dictionary in the model's own units, with no scale and no centre left.

With x = (a - μ_r) / s_r read and ŷ s_w + μ_w written,

    W_enc  ← W_enc / s_r          b_enc ← b_enc - (W_enc / s_r) μ_r
    W_dec  ← W_dec s_w            b_dec ← b_dec s_w + μ_w - Σ_g s_w (W_skip_g / s_r) μ_r
    W_skip ← s_w W_skip / s_r

(a gate's second encoder as the first), so that pre-activations, thresholds and features keep the dictionary's units,
and only activations are raw.
"""

from __future__ import annotations

import copy

import torch

from xlc_ray.config import UserError
from xlc_ray.dictionary.dictionary import Dictionary, FeatureGroup


@torch.no_grad()
def fold(dictionary: Dictionary) -> Dictionary:
    """A new dictionary in inference form, with identity scale and centre and equal features and reconstructions.

    Whole dictionaries only. Raises UserError where the gate ranks by decoder norms, which folding changes."""
    assert dictionary.shards.group is None, "fold needs the whole dictionary"
    assert dictionary.shards.size == 1, "fold needs the whole dictionary"
    if dictionary.gate.needs_norms:
        raise UserError(
            "dictionary.gate.rank_by: decoder_norm compares decoder norms, which folding the normalisation into the "
            "weights changes; train with rank_by: activation"
        )
    folded = copy.deepcopy(dictionary).eval()
    wires = folded.wiring
    read_mean, read_scale = folded.read_mean.double(), folded.read_scale.double()
    write_mean, write_scale = folded.write_mean.double(), folded.write_scale.double()
    bias = folded.b_dec.double() * write_scale + write_mean
    for g, group in enumerate(folded.groups):
        assert isinstance(group, FeatureGroup)
        read, written = _columns(wires.read_spans(g)), _columns(wires.write_spans(g))
        for weight, offset in filter(None, [(group.W_enc, group.b_enc), folded.gate.magnitude(g)]):
            encoder = weight.double() / read_scale[read]
            offset.copy_(offset.double() - encoder @ read_mean[read])
            weight.copy_(encoder)
        group.W_dec.copy_(group.W_dec.double() * write_scale[written])
        if wires.skip:
            linear = folded.W_skip[g].double() * write_scale[written].unsqueeze(1) / read_scale[read]
            bias[written] -= linear @ read_mean[read]
            folded.W_skip[g].copy_(linear)
    folded.b_dec.copy_(bias)
    for name in ("read", "write"):
        getattr(folded, f"{name}_mean").zero_()
        getattr(folded, f"{name}_scale").fill_(1)
    return folded


def _columns(spans: tuple[slice, ...]) -> torch.Tensor:
    """The column numbers of some spans."""
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
