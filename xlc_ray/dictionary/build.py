"""Settings → Dictionary: the one place where the mathematics meets the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import custom, gates, hard_concrete, wiring
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.gated import Gated
from xlc_ray.dictionary.normalization import SiteStatistics, affine
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.wiring import Wiring


def make_wiring(config: settings.Wiring, num_layers: int, width: int, base_width: int | None = None) -> Wiring:
    """The wiring for a model with so many layers of this width. Raises UserError on a layer that the model lacks.

    `base_width`: of the base model's sites, where there is one of another width."""
    one = isinstance(config, settings.ModelDiffWiring)
    asked = (config.layer,) if one else config.layers
    layers = range(num_layers) if asked == "all" else asked
    if beyond := [n for n in layers if n >= num_layers]:
        where = f"dictionary.wiring.{'layer' if one else 'layers'}"
        raise UserError(f"{where}: the model has no layer {beyond[0]}; allowed: 0 to {num_layers - 1}")
    if len(set(layers)) != len(layers) or list(layers) != sorted(layers):
        raise UserError(f"dictionary.wiring.layers: {list(layers)} must rise without repeats")
    match config:
        case settings.SaeWiring(site=site):
            return wiring.sae([f"{site}.{n}" for n in layers], width)
        case settings.TranscoderWiring(skip=skip):
            return wiring.transcoders(layers, width, skip)
        case settings.CltWiring(skip=skip, tied=tied, feature_scale=scale, feature_offset=offset):
            tying = wiring.Tying(tied, scale, offset) if tied else None
            return replace(wiring.clt(layers, width), skip=skip, tied=tying)
        case settings.CrosscoderWiring(site=site, causality=causality):
            return wiring.crosscoder([f"{site}.{n}" for n in layers], width, causality)
        case settings.ModelDiffWiring(site=site):
            return wiring.model_diff(f"{site}.{layers[0]}", width, base_width or width)
        case settings.CustomWiring(path=path, options=options):
            return custom.wiring(path, options, list(layers), width)


def make_gate(config: settings.Gate, sizes: list[int], shards: Shards) -> gates.Gate:
    """The gate for groups of these sizes (on this rank)."""
    match config:
        case settings.ReluGate():
            return gates.ReLU(sizes, shards)
        case settings.JumpReluGate(threshold=threshold, bandwidth=bandwidth, parameterisation=kind):
            return gates.JumpReLU(sizes, shards, threshold, bandwidth, kind)
        case settings.GatedGate(auxiliary=auxiliary):
            return Gated(sizes, shards, auxiliary)
        case settings.HardConcreteGate(input_dependent=by_input):
            return hard_concrete.HardConcrete(sizes, shards, _concrete(config), by_input)
        case settings.GatedHardConcreteGate(auxiliary=auxiliary):
            return hard_concrete.GatedHardConcrete(sizes, shards, _concrete(config), auxiliary)
        case settings.CustomGate(path=path, options=options):
            return custom.gate(path, options, sizes, shards)
        case settings.TopKGate() | settings.BatchTopKGate():
            return gates.TopK(
                sizes,
                shards,
                config.k,
                over_batch=config.kind == "batchtopk",
                over_groups=config.pool == "all" and len(sizes) > 1,
                by_norm=config.rank_by == "decoder_norm",
                by_zscore=config.rank_by == "zscore",
                start=config.threshold_start,
                decay=config.threshold_decay,
            )


def _concrete(config: settings.HardConcreteGate | settings.GatedHardConcreteGate) -> hard_concrete.Shape:
    last = config.beta if config.final_beta is None else config.final_beta
    return hard_concrete.Shape(config.gamma, config.zeta, config.start, config.beta, last, config.beta_hold)


def check_features(config: settings.Dictionary, wires: Wiring) -> None:
    """Raises UserError where a gate wants more features than there are."""
    k, there = getattr(config.gate, "k", 0), config.features * wires.groups
    if k > there:
        raise UserError(f"dictionary.gate.k: {k} exceeds the {there} features of all groups")


def build(config: settings.Dictionary, wires: Wiring, seed: int, shards: Shards) -> Dictionary:
    """This rank's slice of a fresh dictionary in training form; the same seed gives the same whole at any world size.

    Raises UserError where a rank would hold no feature or more features are asked for than there are."""
    sizes = [config.features] * wires.groups
    for g, n in enumerate(sizes):
        if (shards.size - 1) * -(-n // shards.size) >= n:
            raise UserError(
                f"cluster.tensor_parallel: {shards.size} ranks cannot share the {n} features of group {g}: "
                "one would hold none"
            )
    check_features(config, wires)
    local = [hi - lo for lo, hi in map(shards.bounds, sizes)]
    dictionary = Dictionary(wires, sizes, make_gate(config.gate, local, shards), shards, config.products)
    for g, group in enumerate(dictionary.groups):
        tied = config.tie_encoder_init and wires.reads[g] == wires.writes[g]
        norm = 1.0 if config.unit_norm else config.decoder_norm / tied_sites(wires, g) ** 0.5
        group.initialise(seed, g, shards.bounds(sizes[g])[0], norm, tied)
    first = [shards.bounds(n)[0] for n in sizes]
    dictionary.gate.initialise(seed, first, [(group.W_enc, group.b_enc) for group in dictionary.groups])
    return dictionary


def tied_sites(wires: Wiring, g: int) -> int:
    """Written sites over which the norm of a feature is spread that a row of the decoder of group g holds one of."""
    if wires.tied is None:
        return 1
    return len(wires.writes[g] if wires.tied.by == "per_source" else wires.written_sites)


def normalize_by(
    dictionary: Dictionary, config: settings.Normalization, kind: str, stats: Mapping[str, SiteStatistics]
) -> None:
    """Set the dictionary's scale and centre of each site from the store's statistics; `kind`: of the wiring.

    Raises UserError where `center` contradicts the kind of normalisation, and on a site without statistics, without
    E‖x‖ if that is asked for, or constant."""
    wires = dictionary.wiring
    center = config.center
    if config.kind == "mean_norm" and center:
        raise UserError("dictionary.normalization.center: mean_norm is not centred; use rms or mean_std")
    if config.kind == "mean_std" and center is False:
        raise UserError("dictionary.normalization.center: mean_std is always centred; use rms")
    if center is None:
        center = kind in ("clt", "transcoder") and config.kind in ("rms", "unit", "mean_std")
    if config.kind == "mean_std":
        center = True
    for prefix, sites in (("read", wires.read_sites), ("write", wires.written_sites)):
        mean, scale = affine(config.kind, center, sites, wires.widths, stats)
        getattr(dictionary, f"{prefix}_mean").copy_(mean)
        getattr(dictionary, f"{prefix}_scale").copy_(scale)
