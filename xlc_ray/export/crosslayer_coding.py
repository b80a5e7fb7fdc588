"""crosslayer-coding's cross-layer transcoders, in: relu and jumprelu, tied decoders written out.

*.safetensors     encoder_module.encoders.{l}.weight [F, d], .bias_param [F]
                  decoder_module.decoders.{s}->{t}.weight [d, F], .bias_param [d]: a target's bias is their sum
                  decoder_module.decoders.{i}: tied by source (i = s) or by target (i = t, whose bias counts once)
                  decoder_module.feature_scale.{t} [F]: of tied decoders, factors of f
                  theta_manager.log_threshold [L, F] (or log_threshold)
cfg.json          num_features, num_layers, d_model, activation_fn, decoder_tying, normalization_method, …
norm_stats.json   the activations' statistics, here or one directory up, unless normalization_method is none
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary, Shards, gates, wiring
from xlc_ray.export.golden import FILE as GOLDEN
from xlc_ray.export.plain import Weights, assemble, jumprelu
from xlc_ray.export.weights import pick, read_tensors

TYINGS = ("none", "per_source", "per_target")
ENCODER, DECODER = "encoder_module.encoders", "decoder_module.decoders"
EPSILON = 1e-6  # what that program adds to a deviation before it divides


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of crosslayer-coding."""
    if "cfg.json" not in names or not _weight_files(names):
        return False
    return {"num_features", "num_layers", "d_model"} <= set(files.read_mapping(files.join(path, "cfg.json")))


def read(path: str) -> Dictionary:
    """The dictionary in such a directory (of several checkpoints the latest), reading mlp_in and writing mlp_out."""
    where = files.join(path, "cfg.json")
    facts = files.read_mapping(where)
    _check_facts(where, facts)
    if (activation := facts.get("activation_fn")) not in ("relu", "jumprelu"):
        raise UserError(
            f"{where}: activation_fn {activation} depends on the other tokens or layers; allowed: relu, jumprelu: "
            "convert it with crosslayer-coding's convert_batchtopk_to_jumprelu first"
        )
    name = files.join(path, _latest(path, _weight_files(set(files.listdir(path)))))
    tensors = read_tensors(name)
    _check(name, tensors)
    layers = facts["num_layers"]
    groups = [_group(name, tensors, facts, source) for source in range(layers)]
    biases = [_bias(name, tensors, facts, target) for target in range(layers)]
    gate: gates.Gate = gates.ReLU([len(b) for _, b, _ in groups], Shards())
    if activation == "jumprelu":
        key = "log_threshold" if "log_threshold" in tensors else "theta_manager.log_threshold"
        (log,) = pick(tensors, name, key)
        gate = jumprelu(list(log.exp()))
    made = assemble(name, wiring.clt(range(layers), facts["d_model"]), groups, torch.cat(biases), gate)
    _normalise(made, facts, path)
    return made


def _weight_files(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors") and name != GOLDEN)


def _latest(path: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    steps = {name: re.findall(r"\d+", name) for name in names}
    if not all(steps.values()):
        raise UserError(f"{path}: several checkpoints ({', '.join(names)}); leave one in a directory with its cfg.json")
    return max(names, key=lambda name: int(steps[name][-1]))


def _check_facts(where: str, facts: dict[str, Any]) -> None:
    for key in ("num_layers", "d_model"):
        if type(facts[key]) is not int or facts[key] < 1:
            raise UserError(f"{where}: {key} is {facts[key]!r}; allowed: an integer from 1 on")
    if (tying := facts.get("decoder_tying", "none")) not in TYINGS:
        raise UserError(f"{where}: decoder_tying {tying!r} is not known; allowed: {', '.join(TYINGS)}")


def _check(name: str, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        offset = key.startswith("decoder_module.feature_offset") and bool(value.any())
        if offset or key.startswith("decoder_module.skip_weights"):
            raise UserError(
                f"{name}: {key}: feature offsets and skip connections are not read: that program's versions apply them "
                "to other features and sources; allowed: offsets of 0, no skip_weights"
            )


def _group(name: str, tensors: dict[str, Tensor], facts: dict[str, Any], source: int) -> Weights:
    W_enc, b_enc = pick(tensors, name, f"{ENCODER}.{source}.weight", f"{ENCODER}.{source}.bias_param")
    rows = []
    for target in range(source, facts["num_layers"]):
        (weight,) = pick(tensors, name, f"{DECODER}.{_key(facts, source, target)}.weight")
        factor = tensors.get(f"decoder_module.feature_scale.{target}")
        rows.append(weight.T if factor is None else weight.T * factor.unsqueeze(1))
    return W_enc, b_enc, torch.cat(rows, dim=1)


def _key(facts: dict[str, Any], source: int, target: int) -> str:
    return {"per_source": f"{source}", "per_target": f"{target}"}.get(
        facts.get("decoder_tying", "none"), f"{source}->{target}"
    )


def _bias(name: str, tensors: dict[str, Tensor], facts: dict[str, Any], target: int) -> Tensor:
    sources = [target] if facts.get("decoder_tying") == "per_target" else range(target + 1)
    keys = [f"{DECODER}.{_key(facts, source, target)}.bias_param" for source in sources]
    return torch.stack(pick(tensors, name, *keys)).sum(dim=0)


def _normalise(made: Dictionary, facts: dict[str, Any], path: str) -> None:
    """Scale and centre of every site, as that program stored them with the activations."""
    if facts.get("sqrt_d_model_normalize"):  # of older versions
        raise UserError(
            f"{path}/cfg.json: sqrt_d_model_normalize, which overrides normalization_method, is not known here; "
            "allowed: false"
        )
    method = facts.get("normalization_method", "none")
    if method == "none":
        return
    if method not in ("auto", "mean_std", "estimated_mean_std"):
        raise UserError(f"{path}/cfg.json: normalization_method {method} is not known; allowed: none, mean_std, auto")
    here = [files.join(path, "norm_stats.json"), files.join(path, "..", "norm_stats.json")]
    found = [name for name in here if files.exists(name)]
    if not found:
        raise UserError(f"{here[0]}: missing, but cfg.json says normalization_method {method}; copy the dataset's here")
    stats = files.read_mapping(found[0])
    for side, end in (("read", "inputs"), ("write", "targets")):
        means, stds = zip(*(_moments(stats, found[0], n, end) for n in range(facts["num_layers"])), strict=True)
        for key, parts in (("mean", means), ("scale", [std + EPSILON for std in stds])):
            buffer, value = getattr(made, f"{side}_{key}"), torch.cat(list(parts))
            if value.shape != buffer.shape:
                raise UserError(f"{found[0]}: {end} have {len(value)} dimensions in all, the model {len(buffer)}")
            buffer.copy_(value)


def _moments(stats: dict[str, Any], name: str, layer: int, end: str) -> tuple[Tensor, Tensor]:
    entry = (stats.get(str(layer)) or {}).get(end) or {}
    if not isinstance(entry.get("mean"), list) or not isinstance(entry.get("std"), list):
        raise UserError(f"{name}: {layer}.{end} is missing or has no mean and std")
    return torch.tensor(entry["mean"], dtype=torch.float64), torch.tensor(entry["std"], dtype=torch.float64)
