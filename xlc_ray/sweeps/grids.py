"""Grid files of SAE-Interpretability: lists by names of its own, run on a base of ours.

Its keys, or the plural ones of its README, become settings of ours. Windows are of `text.context` tokens:

    train_batch_size, gradient_accumulation_steps   batch_tokens = size × steps × context, accumulate = steps
    n_train_samples                                 train.steps = samples × context / batch_tokens
    warmup_samples                                  train.lr_schedule.warmup = their share of n_train_samples
    dict_size_to_input_ratio                        dictionary.features = ratio × width that a group reads

Where n_train_samples is not given, trials of other batches train on as many tokens as the base. A setting of
gates in `sae_specific` counts for the gates that have it. Order: as there, all keys as nested loops in the order of the
file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from xlc_ray.activations import sites
from xlc_ray.activations.text import from_pretrained
from xlc_ray.config import Config, UserError
from xlc_ray.config.errors import nearest
from xlc_ray.dictionary.build import make_wiring

ALIASES = {
    "learning_rates": "lr",
    "seeds": "seed",
    "sparsity_coeffs": "sparsity_coeff",
    "dict_size_ratios": "dict_size_to_input_ratio",
    "aux_coeffs": "aux_coeff",
    "initial_betas": "initial_beta",
    "final_betas": "final_beta",
}
PLAIN = {
    "lr": "train.lr",
    "seed": "seed",
    "max_grad_norm": "train.clip_norm",
    "sparsity_coeff": "train.loss.sparsity.coefficient",
    "k": "dictionary.gate.k",
    "aux_coeff": "dictionary.gate.auxiliary",
    "initial_beta": "dictionary.gate.beta",
    "final_beta": "dictionary.gate.final_beta",
    "input_dependent_gates": "dictionary.gate.input_dependent",
}
COUNTED = ("dict_size_to_input_ratio", "train_batch_size", "gradient_accumulation_steps", "n_train_samples",
           "warmup_samples")  # fmt: skip
SPECIFIC, LIMIT = "sae_specific", "max_experiments"
KEYS = [*PLAIN, *COUNTED, *ALIASES, SPECIFIC, LIMIT]


def is_grid(tree: dict[str, Any]) -> bool:
    """Whether a file is one of these rather than a sweep of ours."""
    return not {"space", "cases", "base", "search"} & tree.keys() and bool(set(KEYS) & tree.keys())


def sections(tree: dict[str, Any], base: Config, origin: str) -> dict[str, Any]:
    """The sections `cases` and `search` of the sweep that the file asks for. Raises UserError on a key that is not
    known, naming the nearest."""
    axes: dict[str, list[Any]] = {}
    for key, value in _entries(tree, origin):
        name = ALIASES.get(key, key)
        if name in axes:
            raise UserError(f"{origin}: {key}: {name} is given twice")
        axes[name] = value if isinstance(value, list) else [value]
    for name in _known(tree.get(SPECIFIC) or {}, f"{origin}: {SPECIFIC}"):
        name = ALIASES.get(name, name)
        section, _, setting = PLAIN.get(name, "").rpartition(".")
        if section == "dictionary.gate" and not hasattr(base.dictionary.gate, setting):
            del axes[name]
    if not axes:
        raise UserError(f"{origin}: holds no list that applies to the gate {base.dictionary.gate.kind}")
    width = _read_width(base) if "dict_size_to_input_ratio" in axes else 0
    points = itertools.product(*axes.values())
    cases = [_settings(dict(zip(axes, point, strict=True)), base, width) for point in points]
    return {"cases": cases, "search": {"kind": "grid", "max_trials": tree.get(LIMIT)}}


def _entries(tree: dict[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    for key in _known(tree, origin):
        if key == SPECIFIC:
            yield from (tree[key] or {}).items()
        elif key != LIMIT:
            yield key, tree[key]


def _known(tree: dict[str, Any], origin: str) -> list[str]:
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: {tree!r} should be a mapping of lists")
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{origin}: {key}: unknown key; {nearest(str(key), KEYS)}")
    return list(tree)


def _settings(point: dict[str, Any], base: Config, width: int) -> dict[str, Any]:
    """The override that a point of the grid is."""
    found = {PLAIN[name]: value for name, value in point.items() if name in PLAIN}
    if "dict_size_to_input_ratio" in point:
        found["dictionary.features"] = round(point["dict_size_to_input_ratio"] * width)
    train, context = base.train, base.text.context
    parts = point.get("gradient_accumulation_steps", train.accumulate)
    micro = train.batch_tokens // train.accumulate
    if "train_batch_size" in point:
        micro = point["train_batch_size"] * context
    tokens = point["n_train_samples"] * context if "n_train_samples" in point else train.steps * train.batch_tokens
    if {"gradient_accumulation_steps", "train_batch_size"} & point.keys():
        found |= {"train.accumulate": parts, "train.batch_tokens": micro * parts}
    if {"gradient_accumulation_steps", "train_batch_size", "n_train_samples"} & point.keys():
        found["train.steps"] = max(1, round(tokens / (micro * parts)))
    if "warmup_samples" in point:
        found["train.lr_schedule.warmup"] = min(1.0, point["warmup_samples"] * context / tokens)
    return found


def _read_width(base: Config) -> int:
    model = from_pretrained(AutoConfig, base.model, "configuration")
    wiring = make_wiring(base.dictionary.wiring, sites.num_layers(model), sites.width(model))
    return wiring.width(wiring.reads[0])
