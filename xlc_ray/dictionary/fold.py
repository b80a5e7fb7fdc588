"""Folding: the same dictionary in the model's own units, with no scale and no centre left.

With x = (a - μ_r) / s_r read and ŷ s_w + μ_w written,

    W_enc  ← W_enc / s_r          b_enc ← b_enc - (W_enc / s_r) μ_r
    W_dec  ← W_dec s_w            b_dec ← b_dec s_w + μ_w - Σ_g s_w (W_skip_g / s_r) μ_r
    W_skip ← s_w W_skip / s_r

(a gate's second encoder as the first), so that pre-activations, thresholds and features keep the dictionary's units,
and only activations are raw.

Decoder norms fold too, into the features: with n_i = ‖W_dec_i‖

    W_dec_i ← W_dec_i / n_i       W_enc_i, b_enc_i, θ_i ← n_i · the same       so that f_i ← n_i f_i

and f_i is the size of what the feature writes. A row of zeros stays, and its feature, which writes nothing, becomes 0.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.gates import Gate, JumpReLU, ReLU, TopK
from xlc_ray.dictionary.groups import FeatureGroup


@torch.no_grad()
def fold(dictionary: Dictionary) -> Dictionary:
    """A new dictionary in inference form, with identity scale and centre and equal features and reconstructions.

    Whole dictionaries only; of tied decoders every target gets its own, in its own units. Raises UserError where the
    gate ranks by decoder norms, which folding changes, and where decoders are tied with an offset."""
    assert dictionary.shards.group is None, "fold needs the whole dictionary"
    assert dictionary.shards.size == 1, "fold needs the whole dictionary"
    if dictionary.gate.needs_norms:
        raise UserError(
            "dictionary.gate.rank_by: decoder_norm compares decoder norms, which folding the normalisation into the "
            "weights changes; train with rank_by: activation"
        )
    folded = (untie(dictionary) if dictionary.wiring.tied else copy.deepcopy(dictionary)).eval()
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


@torch.no_grad()
def fold_decoder_norms(dictionary: Dictionary) -> Dictionary:
    """A new dictionary in inference form with unit decoder rows, features times the old norms, equal reconstructions.

    A gate that ranked by decoder norms ranks by activation afterwards, which is then the same. Whole dictionaries only.
    Raises UserError where the gate ranks by activation, which folding changes, or has parameters that do not scale.
    """
    assert dictionary.shards.size == 1, "folding needs the whole dictionary"
    folded = copy.deepcopy(untie(dictionary) if dictionary.wiring.tied else dictionary).eval()
    norms = [group.norms().double() for group in folded.groups]
    for group, norm in zip(folded.groups, norms, strict=True):
        group.W_enc.copy_(group.W_enc.double() * norm.unsqueeze(1))
        group.b_enc.copy_(group.b_enc.double() * norm)
        group.W_dec.copy_(group.W_dec.double() / norm.where(norm > 0, 1).unsqueeze(1))
    _scale_gate(folded.gate, norms)
    return folded


def _scale_gate(gate: Gate, norms: list[torch.Tensor]) -> None:
    """Make a gate do to n · pre what it did to pre."""
    if isinstance(gate, JumpReLU):
        for theta, norm in zip(gate.raw_threshold, norms, strict=True):
            # A feature that became 0 passes no θ > 0, and log 0 is no parameter.
            theta.copy_(theta.double() + norm.where(norm > 0, 1).log() if gate.log else theta.double() * norm)
    elif isinstance(gate, TopK) and gate.needs_norms:
        gate.needs_norms = False
    elif isinstance(gate, TopK) and not gate.zscores:
        raise UserError(
            "dictionary.gate.rank_by: activation compares activations, which folding the decoder norms changes; "
            "allowed: decoder_norm, or convert to jumprelu first"
        )
    elif type(gate) is not ReLU:
        kind = "rank_by: zscore" if isinstance(gate, TopK) else type(gate).__name__
        raise UserError(f"dictionary.gate: decoder norms fold into jumprelu, relu and topk, not {kind}")


@torch.no_grad()
def untie(dictionary: Dictionary) -> Dictionary:
    """An untied dictionary that computes what one with tied decoders computes: W_dec [F, W_g] with a row for every
    target. Raises UserError where features have offsets, which no decoder row can hold."""
    wires = dictionary.wiring
    if wires.tied and wires.tied.offset:
        raise UserError(
            "dictionary.wiring.feature_offset: no decoder row can hold an offset of active features, so that this "
            "dictionary has no untied form; train with feature_offset: false"
        )
    loose = replace(wires, tied=None)
    gate = copy.deepcopy(dictionary.gate)
    made = Dictionary(loose, dictionary.sizes, gate, dictionary.shards, dictionary.products).to(dictionary.b_dec)
    own = dictionary.state_dict()
    made.load_state_dict({name: value for name, value in own.items() if not name.endswith(".W_dec")}, strict=False)
    for g, group in enumerate(made.groups):
        group.W_dec.copy_(expanded_decoder(dictionary, g))
    return made.train(dictionary.training)


def expanded_decoder(dictionary: Dictionary, g: int) -> Float[Tensor, "F W"]:
    """What the features of group g write at all its sites, side by side; a copy, also where decoders are not tied."""
    return torch.cat([dictionary.decoder_rows(g, site) for site in dictionary.wiring.writes[g]], dim=1)


def _columns(spans: tuple[slice, ...]) -> torch.Tensor:
    """The column numbers of some spans."""
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])
