"""circuit-tracer: cross-layer transcoders and sets of per-layer transcoders, relu or jumprelu, in raw units.

W_enc_{l}.safetensors   W_enc_{l} [F, d], b_enc_{l} [F], b_dec_{l} [d], threshold_{l} [F] where the gate is jumprelu
W_dec_{l}.safetensors   W_dec_{l} [F, L - l, d]: the target layers l … L-1
layer_{l}.safetensors   W_enc [F, d], b_enc [F], W_dec [F, d], b_dec [d], W_skip [d, d] and
                        activation_function.threshold [F] where there are any
config.yaml             model_kind, model_name, feature_input_hook, feature_output_hook, scan

Its TopK (`activation: topk` and `k` in config.yaml, or `k` in layer_{l}.safetensors) is not read: it keeps the k
largest pre-activations even where they are negative, which no gate here does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import Config, UserError, yaml_text
from xlc_ray.dictionary import Dictionary, Shards, Wiring, gates
from xlc_ray.export.names import HOOKS, kind_and_layer, model_name, site_of_layer
from xlc_ray.export.plain import Weights, assemble, jumprelu, kind_of, plain, refuse, shape_of, thresholds_of, way_out
from xlc_ray.export.weights import pick, read_tensors, write_tensors

NAME = "circuit_tracer"
KINDS = {"clt": "cross_layer_transcoder", "transcoder": "transcoder_set"}
ACTIVATIONS = (None, "relu", "jumprelu", "jump_relu")
THRESHOLD = "activation_function.threshold"


def write(dictionary: Dictionary, config: Config, out: str) -> Dictionary:
    """Write the directory `out`; returns the dictionary as written. Raises UserError where the format has no place."""
    kind = shape_of(dictionary.wiring)
    if kind not in KINDS:
        raise refuse(
            NAME,
            f"the wiring {config.dictionary.wiring.kind}",
            "it holds clt and transcoder; use saelens for SAEs and dictionary_learning for acausal crosscoders",
        )
    if kind == "clt" and dictionary.wiring.skip:
        raise refuse(NAME, "skip connections of a clt", "its loader would drop them; train with skip: false")
    ends = _ends(dictionary.wiring)
    made = plain(dictionary)
    if (gate := kind_of(made.gate)) not in ("relu", "jumprelu"):
        raise refuse(NAME, gate, f"it holds relu and jumprelu; {way_out(gate)}")
    (_write_clt if kind == "clt" else _write_set)(made, out)
    # Without `transcoders`, its list of files, circuit-tracer finds the files beside config.yaml, on the Hub as well.
    facts = {
        "model_kind": KINDS[kind],
        "model_name": model_name(config),
        "feature_input_hook": HOOKS[ends[0]],
        "feature_output_hook": HOOKS[ends[1]],
        "scan": None,
    }
    files.write_bytes(files.join(out, "config.yaml"), yaml_text.dump(facts).encode())
    return made


def _ends(wiring: Wiring) -> tuple[str, str]:
    """The kinds of site read and written. Raises UserError unless group l is of layer l, from 0 on."""
    found = []
    for row in (wiring.reads, [sites[:1] for sites in wiring.writes]):
        places = [kind_and_layer(sites[0]) for sites in row]
        if None in places or len({kind for kind, _ in filter(None, places)}) != 1:
            raise refuse(
                NAME, f"the sites {', '.join(s[0] for s in row)}", "it replaces one kind of site in all layers"
            )
        layers = [layer for _, layer in filter(None, places)]
        if layers != list(range(len(layers))):
            raise refuse(
                NAME,
                f"layers {layers} alone",
                "it replaces every layer from 0 on: train with dictionary.wiring.layers: all, or use saelens",
            )
        found += [kind for kind, _ in filter(None, places)][:1]
    return found[0], found[1]


def _write_clt(made: Dictionary, out: str) -> None:
    thresholds, biases = thresholds_of(made), made.wiring.columns(made.wiring.written_sites)
    for n, group in enumerate(made.groups):
        targets = made.wiring.writes[n]
        encoder: dict[str, Tensor] = {
            f"W_enc_{n}": group.W_enc,
            f"b_enc_{n}": group.b_enc,
            f"b_dec_{n}": made.b_dec[biases[targets[0]]],
        }
        if thresholds:
            encoder[f"threshold_{n}"] = thresholds[n]
        write_tensors(files.join(out, f"W_enc_{n}.safetensors"), encoder)
        decoder = group.W_dec.unflatten(1, (len(targets), -1))
        write_tensors(files.join(out, f"W_dec_{n}.safetensors"), {f"W_dec_{n}": decoder})


def _write_set(made: Dictionary, out: str) -> None:
    thresholds, biases = thresholds_of(made), made.wiring.columns(made.wiring.written_sites)
    for n, group in enumerate(made.groups):
        tensors: dict[str, Tensor] = {"W_enc": group.W_enc, "b_enc": group.b_enc, "W_dec": group.W_dec}
        tensors["b_dec"] = made.b_dec[biases[made.wiring.writes[n][0]]]
        if thresholds:
            tensors[THRESHOLD] = thresholds[n]
        if made.wiring.skip:
            tensors["W_skip"] = made.W_skip[n]
        write_tensors(files.join(out, f"layer_{n}.safetensors"), tensors)


# ---------------------------------------------------------------- in


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of circuit-tracer's."""
    return "W_enc_0.safetensors" in names or "layer_0.safetensors" in names


def read(path: str) -> Dictionary:
    """The dictionary in such a directory. Without config.yaml the sites are taken for mlp_in and mlp_out.

    Raises UserError for an activation that is neither relu nor jumprelu."""
    names = set(files.listdir(path))
    facts: dict[str, Any] = {}
    if "config.yaml" in names:
        name = files.join(path, "config.yaml")
        facts = yaml_text.parse_mapping(files.read_bytes(name), name)
        if (activation := facts.get("activation")) not in ACTIVATIONS:
            raise UserError(f"{name}: activation {activation!r} has no gate here; allowed: relu, jumprelu")
        _refuse_topk(facts, name)
    hook_in = facts.get("feature_input_hook", HOOKS["mlp_in"])
    hook_out = facts.get("feature_output_hook", HOOKS["mlp_out"])
    cross = "W_enc_0.safetensors" in names
    stem = "W_enc" if cross else "layer"
    layers = len([name for name in names if re.fullmatch(rf"{stem}_\d+\.safetensors", name)])
    ins, outs = ([site_of_layer(hook, n) for n in range(layers)] for hook in (hook_in, hook_out))
    return (_read_clt if cross else _read_set)(path, ins, outs)


def _read_clt(path: str, ins: list[str], outs: list[str]) -> Dictionary:
    groups, biases, thresholds = [], [], []
    for n in range(len(ins)):
        name = files.join(path, f"W_enc_{n}.safetensors")
        tensors = read_tensors(name)
        W_enc, b_enc, b_dec = pick(tensors, name, f"W_enc_{n}", f"b_enc_{n}", f"b_dec_{n}")
        decoder = files.join(path, f"W_dec_{n}.safetensors")
        (W_dec,) = pick(read_tensors(decoder), decoder, f"W_dec_{n}")
        groups.append((W_enc, b_enc, W_dec.flatten(1)))
        biases.append(b_dec)
        thresholds += [tensors[f"threshold_{n}"]] if f"threshold_{n}" in tensors else []
    writes = tuple(tuple(outs[n:]) for n in range(len(outs)))
    wiring = Wiring(_widths(ins, outs, biases), tuple((s,) for s in ins), writes)
    return assemble(path, wiring, groups, torch.cat(biases), _gate(path, groups, thresholds))


def _read_set(path: str, ins: list[str], outs: list[str]) -> Dictionary:
    groups, biases, thresholds, skips = [], [], [], []
    for n in range(len(ins)):
        name = files.join(path, f"layer_{n}.safetensors")
        tensors = read_tensors(name)
        _refuse_topk(tensors, name)
        W_enc, b_enc, W_dec, b_dec = pick(tensors, name, "W_enc", "b_enc", "W_dec", "b_dec")
        groups.append((W_enc, b_enc, W_dec))
        biases.append(b_dec)
        thresholds += [tensors[THRESHOLD].expand_as(b_enc)] if THRESHOLD in tensors else []
        skips += [tensors["W_skip"]] if "W_skip" in tensors else []
    if skips and len(skips) != len(groups):
        raise UserError(f"{path}: W_skip is in {len(skips)} of {len(groups)} layers; allowed: all or none")
    rows = [tuple((s,) for s in sites) for sites in (ins, outs)]
    wiring = Wiring(_widths(ins, outs, biases), rows[0], rows[1], skip=bool(skips))
    return assemble(path, wiring, groups, torch.cat(biases), _gate(path, groups, thresholds), skips)


def _refuse_topk(found: Mapping[str, Any], name: str) -> None:
    if found.get("k") is not None:
        raise UserError(f"{name}: k of a topk, which keeps negative values too, has no gate here; allowed: no k")


def _widths(ins: list[str], outs: list[str], biases: list[Tensor]) -> dict[str, int]:
    return {site: len(bias) for sites in (ins, outs) for site, bias in zip(sites, biases, strict=True)}


def _gate(path: str, groups: list[Weights], thresholds: list[Tensor]) -> gates.Gate:
    if not thresholds:
        return gates.ReLU([len(b) for _, b, _ in groups], Shards())
    if len(thresholds) != len(groups):
        raise UserError(f"{path}: {len(thresholds)} of {len(groups)} layers have thresholds; allowed: all or none")
    return jumprelu(thresholds)
