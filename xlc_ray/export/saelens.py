"""SAELens (≥ 6): an SAE or transcoder of one site a folder, in raw units.

    cfg.json                   architecture, d_in, d_sae, dtype, apply_b_dec_to_input, normalize_activations, metadata …
    sae_weights.safetensors    W_enc [d, F], b_enc [F], W_dec [F, d_out], b_dec [d_out],
                               threshold [F] where the gate is jumprelu, W_skip [d_out, d] where there is a skip;
                               gated: b_gate, r_mag, b_mag [F] and no b_enc
    sparsity.safetensors       sparsity [F]: log10(density + 1e-10), where the run was evaluated (not read)

A dictionary of several sites becomes a folder for each, named like the site that is read.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary, Shards, Wiring, gates
from xlc_ray.export.names import hook_of, model_name, public, site_of
from xlc_ray.export.plain import (
    assemble,
    folder_of,
    gated,
    gated_biases,
    jumprelu,
    kind_of,
    plain,
    refuse,
    shape_of,
    thresholds_of,
    topk,
    uncentred,
    unit_rows,
    way_out,
)
from xlc_ray.export.weights import folders, pick, read_tensors, write_tensors

NAME = "saelens"
WEIGHTS, FACTS = "sae_weights.safetensors", "cfg.json"
SPARSITY, EPSILON = "sparsity.safetensors", 1e-10
GATED = ("b_gate", "r_mag", "b_mag")
ARCHITECTURES = {
    ("sae", "relu"): "standard",
    ("sae", "jumprelu"): "jumprelu",
    ("sae", "topk"): "topk",
    ("sae", "gated"): "gated",
    ("transcoder", "relu"): "transcoder",
    ("transcoder", "jumprelu"): "jumprelu_transcoder",
    ("skip", "relu"): "skip_transcoder",
    ("skip", "jumprelu"): "jumprelu_skip_transcoder",
}
_NORMALISED_BY_TOKEN = ("layer_norm", "constant_norm_rescale", "covariance_whitening")


def write(dictionary: Dictionary, config: Config, out: str) -> Dictionary:
    """Write the directory `out`; returns the dictionary as written. Raises UserError where the format has no place."""
    kind = shape_of(dictionary.wiring)
    if kind not in ("sae", "transcoder"):
        raise refuse(
            NAME,
            f"the wiring {config.dictionary.wiring.kind}",
            "it holds SAEs and per-layer transcoders; use circuit_tracer for clt and dictionary_learning for acausal "
            "crosscoders",
        )
    made = plain(dictionary)
    kind = "skip" if made.wiring.skip else kind
    gate = kind_of(made.gate)
    if (kind, gate) not in ARCHITECTURES:
        raise refuse(NAME, f"transcoders with {gate}", way_out(gate))
    for g in range(made.wiring.groups):
        _write_one(made, g, config, ARCHITECTURES[kind, gate], folder_of(made, g, out))
    return made


def write_densities(made: Dictionary, densities: list[Tensor], out: str) -> None:
    """Write sparsity.safetensors into each folder of `out`. densities: of each group the share of tokens at which a
    feature [F] is active."""
    for g, density in enumerate(densities):
        log = (density.double() + EPSILON).log10()
        write_tensors(files.join(folder_of(made, g, out), SPARSITY), {"sparsity": log})


def _write_one(made: Dictionary, g: int, config: Config, architecture: str, folder: str) -> None:
    facts = _facts(made, g, config, architecture)
    write_tensors(files.join(folder, WEIGHTS), _tensors(made, g))
    files.write_json(files.join(folder, FACTS), facts)


def _tensors(made: Dictionary, g: int) -> dict[str, Tensor]:
    group, thresholds, (written,) = made.groups[g], thresholds_of(made), made.wiring.writes[g]
    bias = made.b_dec[made.wiring.columns(made.wiring.written_sites)[written]]
    tensors: dict[str, Tensor] = {"W_enc": group.W_enc.T, "W_dec": group.W_dec, "b_dec": bias}
    if kind_of(made.gate) == "gated":
        tensors |= dict(zip(GATED, gated_biases(made, g, group.b_enc.double()), strict=True))
    else:
        tensors["b_enc"] = group.b_enc
    if thresholds:
        tensors["threshold"] = thresholds[g]
    if made.wiring.skip:
        tensors["W_skip"] = made.W_skip[g]
    return tensors


def _facts(made: Dictionary, g: int, config: Config, architecture: str) -> dict[str, Any]:
    group, (read,), (written,) = made.groups[g], made.wiring.reads[g], made.wiring.writes[g]
    metadata: dict[str, Any] = {
        "sae_lens_version": "6.0.0",  # of the layout: what has none is read as an older one
        "sae_lens_training_version": None,
        "model_name": model_name(config),
        "hook_name": hook_of(read),
        "hook_head_index": None,
        "context_size": config.text.context,
        "prepend_bos": config.text.prepend_bos,
        "exclude_special_tokens": config.text.ignore_special,
        "dataset_path": " + ".join(public(str(part.dataset)) for part in config.text.parts()),
    }
    facts: dict[str, Any] = {
        "architecture": architecture,
        "d_in": group.W_enc.shape[1],
        "d_sae": group.W_enc.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if isinstance(made.gate, gates.TopK):
        facts |= {"k": made.gate.k, "rescale_acts_by_decoder_norm": False}
    if "transcoder" in architecture:
        facts["d_out"] = group.W_dec.shape[1]
        metadata["hook_name_out"] = hook_of(written)
    return facts


# ---------------------------------------------------------------- in


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of SAELens, or holds folders that are."""
    return WEIGHTS in names or bool(folders(path, names, WEIGHTS))


def read(path: str) -> Dictionary:
    """The dictionary in such a directory, with a group for each of its folders.

    Raises UserError for an architecture that has no gate here, for a normalisation token by token, and where one of
    the folders is not whole."""
    names = set(files.listdir(path))
    found = [path] if WEIGHTS in names else {*folders(path, names, FACTS), *folders(path, names, WEIGHTS)}
    parts = sorted((_read_one(folder) for folder in found), key=lambda part: _in_order(part["read"]))
    if len(kinds := {part["architecture"] for part in parts}) > 1:
        raise UserError(f"{path}: holds {' and '.join(sorted(kinds))}; load the folders one by one")
    if len({part["written"] for part in parts}) < len(parts):
        raise UserError(f"{path}: several folders write the same site; load them one by one")
    widths: dict[str, int] = {}
    for side, tensor in (("read", lambda w: w[0].shape[1]), ("written", lambda w: w[2].shape[1])):
        widths |= {part[side]: tensor(part["weights"]) for part in parts if part[side] not in widths}
    reads, writes = (tuple((part[side],) for part in parts) for side in ("read", "written"))
    skips = [part["skip"] for part in parts if part["skip"] is not None]
    wiring = Wiring(widths, reads, writes, skip=bool(skips))
    biases = {part["written"]: part["b_dec"] for part in parts}
    b_dec = torch.cat([biases[site] for site in wiring.written_sites])
    return assemble(path, wiring, [part["weights"] for part in parts], b_dec, _gate(path, parts), skips)


def _in_order(site: str) -> list[str | int]:
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"(\d+)", site))]


def _gate(path: str, parts: list[dict[str, Any]]) -> gates.Gate:
    sizes = [len(part["weights"][1]) for part in parts]
    if parts[0]["gated"] is not None:
        return gated([part["gated"] for part in parts])
    if parts[0]["threshold"] is not None:
        return jumprelu([part["threshold"] for part in parts])
    if parts[0]["k"] is None:
        return gates.ReLU(sizes, Shards())
    if len(budgets := {part["k"] for part in parts}) > 1:
        raise UserError(f"{path}: folders differ in k ({sorted(budgets)}); load them one by one")
    return topk(sizes, parts[0]["k"])


def _read_one(folder: str) -> dict[str, Any]:
    where = files.join(folder, FACTS)
    facts = files.read_mapping(where)
    metadata, architecture = facts.get("metadata"), str(facts.get("architecture"))
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: written by SAELens before 6.0; load it with a newer one and save it again")
    if architecture not in ARCHITECTURES.values():
        allowed = ", ".join(ARCHITECTURES.values())
        raise UserError(f"{where}: architecture {architecture!r} has no gate here; allowed: {allowed}")
    if (normal := facts.get("normalize_activations", "none")) in _NORMALISED_BY_TOKEN:
        raise UserError(
            f"{where}: normalize_activations {normal} is not linear; allowed: none, expected_average_only_in"
        )
    k = facts.get("k") if architecture == "topk" else None
    if architecture == "topk" and (type(k) is not int or k < 1):
        raise UserError(f"{where}: architecture topk with k {k!r}; allowed: an integer from 1 on")
    name = files.join(folder, WEIGHTS)
    tensors = read_tensors(name)
    W_enc, W_dec, b_dec = pick(tensors, name, "W_enc", "W_dec", "b_dec")
    own = pick(tensors, name, *GATED) if architecture == "gated" else None
    b_enc = torch.zeros_like(own[0]) if own else pick(tensors, name, "b_enc")[0]
    if "transcoder" not in architecture and facts.get("apply_b_dec_to_input", True):
        b_enc = uncentred(name, W_enc.T, b_enc, b_dec)
    weights = (W_enc.T, b_enc, W_dec)
    if facts.get("rescale_acts_by_decoder_norm"):
        weights = unit_rows(name, *weights)
    hook = str(metadata.get("hook_name") or "input")
    transcodes = "transcoder" in architecture
    return {
        "architecture": architecture,
        "weights": weights,
        "b_dec": b_dec,
        "gated": own,
        "threshold": pick(tensors, name, "threshold")[0] if "jumprelu" in architecture else None,
        "skip": pick(tensors, name, "W_skip")[0] if "skip" in architecture else None,
        "k": k,
        "read": site_of(hook),
        "written": site_of(str(metadata.get("hook_name_out") or f"{hook}.out")) if transcodes else site_of(hook),
    }
