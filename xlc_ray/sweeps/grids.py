"""Grid files of SAE-Interpretability: lists by names of its own, run on a base of ours.

Its keys, or the plural ones of its README, become settings of ours. Windows are of `text.context` tokens:

    train_batch_size, gradient_accumulation_steps   batch_tokens = size × steps × context, accumulate = steps
    n_train_samples                                 train.steps = samples × context / batch_tokens
    warmup_samples                                  train.lr_schedule.warmup = their share of n_train_samples
    lr_schedule                                     train.lr_schedule of that kind, with the base's warm-up and end
    dict_size_to_input_ratio                        dictionary.features = ratio × width that a group reads

Where n_train_samples is not given, trials of other batches train on as many tokens as the base. A linear decay is cut
to what the warm-up leaves of the run. A setting of gates in `sae_specific` counts for the gates that have it.
magnitude_activation may only name what the base's gate does, and wandb_run_name sets nothing: trials are named by what
differs. Order: as there, all keys as nested loops in the order of the file, those of `sae_specific` innermost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from xlc_ray.activations import sites
from xlc_ray.activations.text import from_pretrained
from xlc_ray.config import Config, UserError
from xlc_ray.config.errors import nearest
from xlc_ray.config.losses import Linear
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
COUNTED = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "n_train_samples": 1, "warmup_samples": 0}
"""Whole numbers, and the least that each may be."""
RATIO, SCHEDULE, MAGNITUDE, NAME = "dict_size_to_input_ratio", "lr_schedule", "magnitude_activation", "wandb_run_name"
SCHEDULES = ("linear", "cosine")
MAGNITUDES = {"hard_concrete": "none", "gated_hard_concrete": "relu"}
"""What our gates do to the magnitude that z multiplies."""
SPECIFIC, LIMIT = "sae_specific", "max_experiments"
KEYS = [*PLAIN, *COUNTED, RATIO, SCHEDULE, MAGNITUDE, NAME, *ALIASES, SPECIFIC, LIMIT]


def is_grid(tree: dict[str, Any]) -> bool:
    """Whether a file is one of these rather than a sweep of ours."""
    return not {"space", "cases", "base", "search"} & tree.keys() and bool(set(KEYS) & tree.keys())


def sections(tree: dict[str, Any], base: Config, origin: str) -> dict[str, Any]:
    """The sections `cases` and `search` of the sweep that the file asks for. Raises UserError on a key that is not
    known, naming the nearest, and on values that it cannot have."""
    gate, axes = base.dictionary.gate, {}
    for key, value, specific in _entries(tree, origin):
        name = ALIASES.get(key, key)
        if name in axes:
            raise UserError(f"{origin}: {key}: {name} is given twice")
        section, _, setting = PLAIN.get(name, "").rpartition(".")
        foreign = section == "dictionary.gate" and not hasattr(gate, setting)
        if specific and (foreign or (name == MAGNITUDE and gate.kind not in MAGNITUDES)):
            continue
        values = value if isinstance(value, list) else [value]
        axes[name] = [_checked(name, v, gate.kind, f"{origin}: {key}") for v in values]
        if not values or (name == NAME and len(values) > 1):
            raise UserError(f"{origin}: {key}: {len(values)} values; allowed: {'one' if values else 'one or more'}")
    for name in {MAGNITUDE, NAME} & axes.keys():
        del axes[name]
    if not axes:
        raise UserError(f"{origin}: holds no list that applies to the gate {gate.kind}")
    width = _read_width(base) if RATIO in axes else 0
    points = itertools.product(*axes.values())
    cases = [_settings(dict(zip(axes, point, strict=True)), base, width) for point in points]
    return {"cases": cases, "search": {"kind": "grid", "max_trials": tree.get(LIMIT)}}


def _entries(tree: dict[str, Any], origin: str) -> Iterator[tuple[str, Any, bool]]:
    """(key, its values, whether it is of SPECIFIC), in the order of the loops."""
    for key in _known(tree, origin):
        if key not in (SPECIFIC, LIMIT):
            yield key, tree[key], False
    specific = {} if tree.get(SPECIFIC) is None else tree[SPECIFIC]
    for key in _known(specific, f"{origin}: {SPECIFIC}"):
        if key in (SPECIFIC, LIMIT):
            raise UserError(f"{origin}: {SPECIFIC}: {key}: stands beside {SPECIFIC}, not in it")
        yield key, specific[key], True


def _checked(name: str, value: Any, gate: str, where: str) -> Any:
    """A value, if the key may have it; settings of ours are checked with the trials."""
    if name == SCHEDULE and value not in SCHEDULES:
        raise UserError(f"{where}: {value!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    if name == MAGNITUDE and (allowed := MAGNITUDES.get(gate)) != ("none" if value is None else value):
        raise UserError(
            f"{where}: {value!r} is not what the gate {gate} does; allowed there: {allowed or 'no such key'}"
        )
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name == RATIO and not (number and value > 0):
        raise UserError(f"{where}: {value!r} is no ratio; allowed: numbers above 0")
    if name in COUNTED:
        if not (number and value >= COUNTED[name] and value == int(value)):
            raise UserError(f"{where}: {value!r} is no count; allowed: whole numbers from {COUNTED[name]}")
        return int(value)
    return value


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
    if RATIO in point:
        found["dictionary.features"] = round(point[RATIO] * width)
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
    return found | _schedule(point, base, tokens)


def _schedule(point: dict[str, Any], base: Config, tokens: int) -> dict[str, Any]:
    """What it changes in the learning rate's schedule."""
    schedule, found = base.train.lr_schedule, {}
    kind, given = point.get(SCHEDULE, schedule.kind), schedule.model_dump()
    if kind != schedule.kind:
        given = {"kind": kind} | {name: given[name] for name in ("warmup", "end") if name in given}
    if SCHEDULE in point:
        found["train.lr_schedule"] = given
    warmup = given["warmup"]
    if "warmup_samples" in point:
        warmup = found["train.lr_schedule.warmup"] = min(1.0, point["warmup_samples"] * base.text.context / tokens)
    if kind == "linear" and warmup + given.get("decay", Linear.model_fields["decay"].default) > 1:
        found["train.lr_schedule.decay"] = 1 - warmup
    return found


def _read_width(base: Config) -> int:
    model = from_pretrained(AutoConfig, base.model, "configuration")
    wiring = make_wiring(base.dictionary.wiring, sites.num_layers(model), sites.width(model))
    return wiring.width(wiring.reads[0])
