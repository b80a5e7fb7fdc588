"""dictionary_learning: an autoencoder of one site a folder, or a crosscoder, in raw units.

    ae.pt, config.json         {"trainer": {dict_class, activation_dim, dict_size, k, layer, …}, "buffer": {ctx_len}}
      AutoEncoder              bias [d], encoder.weight [F, d], encoder.bias [F], decoder.weight [d, F] of unit columns
      GatedAutoEncoder         decoder_bias [d], gate_bias, r_mag, mag_bias [F], encoder.weight, decoder.weight
      AutoEncoderTopK          b_dec [d], k, threshold, encoder.*, decoder.weight
      BatchTopKSAE             the same; f = max(pre, 0) · 1[pre > threshold]
      JumpReluAutoEncoder      W_enc [d, F], b_enc, W_dec [F, d], b_dec, threshold [F]
      only read                AutoEncoderNew: AutoEncoder with decoder.bias, and columns as they are;
                               MatryoshkaBatchTopKSAE: BatchTopKSAE with the names of JumpReluAutoEncoder
    cc_weights.pt, cfg.json    a relu crosscoder of L sites: W_enc [L, d, F], b_enc [F], W_dec [F, L, d], b_dec [L, d]

Where the encoder is fed x - b (`centred`), its bias is b_enc + W_enc b. A dictionary of several sites
becomes a folder for each. The library makes the columns of an AutoEncoder unit ones as it loads it, which scales
features; so they are written as unit columns, with features in those units.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary, Shards, Wiring, gates
from xlc_ray.export.names import hook_of, kind_and_layer, model_name, site_of
from xlc_ray.export.plain import (
    Weights,
    assemble,
    batchtopk,
    crosscoder,
    folder_of,
    gated,
    gated_biases,
    jumprelu,
    kind_of,
    plain,
    refuse,
    shape_of,
    topk,
    uncentred,
    unit_rows,
)
from xlc_ray.export.weights import folders, pick, read_tensors, write_tensors

NAME = "dictionary_learning"
WEIGHTS, FACTS, CROSSCODER = "ae.pt", "config.json", "cc_weights.pt"


class Layout(NamedTuple):
    """How a class is stored: its trainer, the names of the decoder's bias and of the gate's tensors, whether the
    encoder is fed x - b, and whether its weights are W_enc [d, F] and W_dec [F, d] instead of two linear maps."""

    trainer: str
    bias: str
    own: tuple[str, ...]
    centred: bool = True
    matrices: bool = False


CLASSES = {
    "AutoEncoder": Layout("StandardTrainer", "bias", ()),
    "GatedAutoEncoder": Layout("GatedSAETrainer", "decoder_bias", ("gate_bias", "r_mag", "mag_bias")),
    "AutoEncoderTopK": Layout("TopKTrainer", "b_dec", ("k", "threshold")),
    "BatchTopKSAE": Layout("BatchTopKTrainer", "b_dec", ("k", "threshold")),
    "JumpReluAutoEncoder": Layout("JumpReluTrainer", "b_dec", ("threshold",), centred=False, matrices=True),
    "AutoEncoderNew": Layout("StandardTrainerAprilUpdate", "decoder.bias", (), centred=False),
    "MatryoshkaBatchTopKSAE": Layout("MatryoshkaBatchTopKTrainer", "b_dec", ("k", "threshold"), matrices=True),
}


def write(dictionary: Dictionary, config: Config, out: str) -> Dictionary:
    """Write the directory `out`; returns the dictionary as written. Raises UserError where the format has no place."""
    kind = shape_of(dictionary.wiring)
    if kind not in ("sae", "crosscoder"):
        raise refuse(
            NAME,
            f"the wiring {config.dictionary.wiring.kind}"
            + (f" ({config.dictionary.wiring.causality})" if config.dictionary.wiring.kind == "crosscoder" else ""),
            "it holds SAEs and acausal crosscoders; use circuit_tracer for clt and transcoder",
        )
    if dictionary.wiring.skip:
        raise refuse(NAME, "skip connections", "use saelens, or circuit_tracer for transcoder")
    made = plain(dictionary)
    if kind == "crosscoder":
        return _write_crosscoder(made, config, out)
    if isinstance(made.gate, gates.ReLU):
        parts = [unit_rows(out, g.W_enc, g.b_enc, g.W_dec) for g in made.groups]
        made = assemble(out, made.wiring, parts, made.b_dec, made.gate)
    for g in range(made.wiring.groups):
        _write_one(made, dictionary.gate, g, config, out)
    return made


def _write_one(made: Dictionary, trained: gates.Gate, g: int, config: Config, out: str) -> None:
    (site,), (features, width) = made.wiring.reads[g], made.groups[g].W_enc.shape
    name, tensors = _tensors(made, trained, g)
    kind, layer = kind_and_layer(site) or (site, None)
    trainer = {
        "trainer_class": CLASSES[name].trainer,
        "dict_class": name,
        "activation_dim": width,
        "dict_size": features,
        **({"k": int(tensors["k"])} if "k" in tensors else {}),
        "layer": layer,
        "lm_name": model_name(config),
        "submodule_name": f"{kind}_layer_{layer}" if layer is not None else site,
    }
    folder = folder_of(made, g, out)
    write_tensors(files.join(folder, WEIGHTS), tensors)
    buffer = {"d_submodule": width, "io": "out", "ctx_len": config.text.context}
    files.write_json(files.join(folder, FACTS), {"trainer": trainer, "buffer": buffer})


def _tensors(made: Dictionary, trained: gates.Gate, g: int) -> tuple[str, dict[str, Tensor]]:
    """The class for group g and its state; `trained` is the gate before it was made plain."""
    group, (site,) = made.groups[g], made.wiring.reads[g]
    W_enc, W_dec = group.W_enc.detach(), group.W_dec.detach()
    bias = made.b_dec.detach()[made.wiring.columns(made.wiring.written_sites)[site]]
    shifted = group.b_enc.detach().double() + W_enc.double() @ bias.double()
    linear: dict[str, Tensor] = {"encoder.weight": W_enc, "decoder.weight": W_dec.T}
    if kind_of(made.gate) == "gated":
        names, values = CLASSES["GatedAutoEncoder"].own, gated_biases(made, g, shifted)
        return "GatedAutoEncoder", {"decoder_bias": bias, **linear, **dict(zip(names, values, strict=True))}
    linear["encoder.bias"] = shifted.to(W_enc.dtype)
    if isinstance(made.gate, gates.ReLU):
        return "AutoEncoder", {"bias": bias, **linear}
    if isinstance(made.gate, gates.TopK):
        name, k, threshold = "AutoEncoderTopK", made.gate.k, torch.tensor(-1.0)  # -1: it has none
    elif isinstance(trained, gates.TopK) and trained.over_batch and not (trained.over_groups or trained.needs_norms):
        name, k, threshold = "BatchTopKSAE", trained.k, trained.inference_threshold[g]
    else:
        theta = made.gate.threshold(g)
        assert isinstance(theta, Tensor)
        plain_names = {"W_enc": W_enc.T, "b_enc": group.b_enc, "W_dec": W_dec, "b_dec": bias, "threshold": theta}
        return "JumpReluAutoEncoder", plain_names
    return name, {"b_dec": bias, "k": torch.tensor(k, dtype=torch.int32), "threshold": threshold, **linear}


def _write_crosscoder(made: Dictionary, config: Config, out: str) -> Dictionary:
    if not isinstance(made.gate, gates.ReLU):
        gate = config.dictionary.gate.kind
        raise refuse(
            NAME, f"crosscoders with {gate}", "its crosscoders are relu; the run itself loads with xlc_ray.load"
        )
    (sites,), group = made.wiring.reads, made.groups[0]
    if len({made.wiring.widths[site] for site in sites}) > 1:
        raise refuse(NAME, "sites of several widths", "the run itself loads with xlc_ray.load")
    features, count = len(group.b_enc), len(sites)
    tensors: dict[str, Tensor] = {
        "W_enc": group.W_enc.unflatten(1, (count, -1)).permute(1, 2, 0),
        "W_dec": group.W_dec.unflatten(1, (count, -1)),
        "b_enc": group.b_enc,
        "b_dec": made.b_dec.unflatten(0, (count, -1)),
    }
    facts = {
        "d_in": made.wiring.widths[sites[0]],
        "dict_size": features,
        "n_models": count,  # how that program calls what it stacks
        "enc_dtype": "fp32",
        "dec_init_norm": config.dictionary.decoder_norm,
        "seed": config.seed,
        "device": "cpu",
        "model_name": model_name(config),
        "hook_points": [hook_of(site) for site in sites],
    }
    write_tensors(files.join(out, CROSSCODER), tensors)
    files.write_json(files.join(out, "cfg.json"), facts)
    return made


# ---------------------------------------------------------------- in


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of dictionary_learning, or holds folders that are."""
    return WEIGHTS in names or CROSSCODER in names or bool(folders(path, names, WEIGHTS))


def read(path: str) -> Dictionary:
    """The dictionary in such a directory, with a group for each of its folders.

    Raises UserError where one of them is not whole."""
    names = set(files.listdir(path))
    if CROSSCODER in names:
        return _read_crosscoder(path)
    found = [path] if WEIGHTS in names else {*folders(path, names, FACTS), *folders(path, names, WEIGHTS)}
    parts = sorted((_read_one(folder) for folder in found), key=lambda part: part[0])
    kinds = {part[1] for part in parts}
    if len(kinds) > 1 or len({part[0] for part in parts}) < len(parts):
        raise UserError(f"{path}: its folders hold several classes, or a site twice; load them one by one")
    sites = [f"{kind}.{layer}" if layer >= 0 else kind for (kind, layer), *_ in parts]
    groups, biases = [part[2] for part in parts], [part[3] for part in parts]
    rows = tuple((site,) for site in sites)
    wiring = Wiring({site: len(bias) for site, bias in zip(sites, biases, strict=True)}, rows, rows)
    gate = _gate(path, kinds.pop(), [len(b) for _, b, _ in groups], [part[4] for part in parts])
    return assemble(path, wiring, groups, torch.cat(biases), gate)


def _gate(path: str, kind: str, sizes: list[int], tensors: list[dict[str, Tensor]]) -> gates.Gate:
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return gates.ReLU(sizes, Shards())
    if kind == "GatedAutoEncoder":
        return gated([(t["gate_bias"], t["r_mag"], t["mag_bias"]) for t in tensors])
    if kind == "JumpReluAutoEncoder":
        return jumprelu([t["threshold"] for t in tensors])
    budgets = {int(t["k"]) for t in tensors}
    if len(budgets) > 1:
        raise UserError(f"{path}: folders differ in k ({sorted(budgets)}); load them one by one")
    if kind == "AutoEncoderTopK":
        return topk(sizes, budgets.pop())
    return batchtopk(sizes, budgets.pop(), torch.stack([t["threshold"].reshape(()) for t in tensors]))


Part = tuple[tuple[str, int], str, Weights, Tensor, dict[str, Tensor]]
"""(kind of site, layer or -1), class, weights, b_dec, all tensors."""


def _read_one(folder: str) -> Part:
    where = files.join(folder, FACTS)
    trainer = files.read_mapping(where).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{where}: has no trainer")
    kind = str(trainer.get("dict_class"))
    if kind not in CLASSES:
        raise UserError(f"{where}: dict_class {kind!r} has no gate here; allowed: {', '.join(CLASSES)}")
    layout, name = CLASSES[kind], files.join(folder, WEIGHTS)
    tensors = read_tensors(name)
    encoder, decoder = ("W_enc", "W_dec") if layout.matrices else ("encoder.weight", "decoder.weight")
    W_enc, W_dec, b_dec, *own = pick(tensors, name, encoder, decoder, layout.bias, *layout.own)
    W_enc, W_dec = (W_enc.T, W_dec) if layout.matrices else (W_enc, W_dec.T)
    if kind == "GatedAutoEncoder":
        b_enc = torch.zeros_like(own[0])
    else:
        (b_enc,) = pick(tensors, name, "b_enc" if layout.matrices else "encoder.bias")
    if layout.centred:
        b_enc = uncentred(name, W_enc, b_enc, b_dec)
    weights: Weights = (W_enc, b_enc, W_dec)
    return _place(trainer), kind, unit_rows(name, *weights) if kind == "AutoEncoder" else weights, b_dec, tensors


def _place(trainer: dict[str, Any]) -> tuple[str, int]:
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    if found := re.fullmatch(r"(\w+)_layer_(\d+)", str(name)):
        return found[1], int(found[2])
    if name is None and isinstance(layer, int):
        return "resid_post", layer  # what its own scripts read where they name no submodule
    return str(name), -1


def _read_crosscoder(path: str) -> Dictionary:
    name = files.join(path, CROSSCODER)
    facts = files.read_mapping(files.join(path, "cfg.json"))
    hooks = facts.get("hook_points")

    def sites_of(count: int) -> list[str]:
        if isinstance(hooks, list) and len(hooks) == count:
            return [site_of(str(hook)) for hook in hooks]
        return [f"{n}:{facts.get('hook_point', 'input')}" for n in range(count)]  # two models at one place

    return crosscoder(name, read_tensors(name), sites_of)
