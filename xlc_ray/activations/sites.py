"""Sites: named places in a model. "mlp_in.3" is a kind and a layer; a family of models says which module that is.

    resid_pre l ─▶ [norm, attention] ─▶ attn_out l ─▶ + ─▶ [norm] ─▶ mlp_in l ─▶ [mlp] ─▶ mlp_out l ─▶ + ─▶ resid_post l

`attn_out` and `mlp_out` are what is added to the residual stream: in Gemma that is after the norms that follow
attention and MLP. `mlp_in` is what the MLP reads, after its norm.

"resid_post.2" is a site of `model`; "resid_post.2@base" is the same place in `base_model`, and a site of its own.
"""

from __future__ import annotations

from typing import Any

from xlc_ray.config import UserError

KINDS = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
"""Kinds of sites, in the order in which a layer computes them."""

BASE = "@base"
"""What ends the name of a site of `base_model`."""

Place = tuple[str, str]

_BLOCK: dict[str, Place] = {"resid_pre": ("", "input"), "resid_post": ("", "output")}
_LLAMA: dict[str, Place] = _BLOCK | {
    "attn_out": ("self_attn", "output"),
    "mlp_in": ("mlp", "input"),
    "mlp_out": ("mlp", "output"),
}
_GEMMA = _LLAMA | {
    "attn_out": ("post_attention_layernorm", "output"),
    "mlp_out": ("post_feedforward_layernorm", "output"),
}

FAMILIES: dict[str, tuple[str, dict[str, Place]]] = {
    "gpt2": ("transformer.h", _LLAMA | {"attn_out": ("attn", "output")}),
    "gpt_neox": ("gpt_neox.layers", _LLAMA | {"attn_out": ("attention", "output")}),
    "llama": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA),
    "gemma2": ("model.layers", _GEMMA),
    "gemma3_text": ("model.layers", _GEMMA),
    "gemma3": ("model.language_model.layers", _GEMMA),
}
"""transformers' `model_type` → where its blocks are, and where each kind of site is within a block."""


def parse(site: str) -> tuple[str, int]:
    """("mlp_in", 3) of "mlp_in.3" and of "mlp_in.3@base". Raises UserError on anything else."""
    kind, _, layer = site.removesuffix(BASE).partition(".")
    if kind not in KINDS or not layer.isdecimal():
        raise UserError(
            f"site {site!r}: not a site; write kind.layer (of the base model kind.layer{BASE}), "
            f"kinds: {', '.join(KINDS)}"
        )
    return kind, int(layer)


def of_base(site: str) -> bool:
    """Whether a site is one of `base_model`."""
    return site.endswith(BASE)


def order_key(site: str) -> tuple[int, int, bool]:
    """Sorts sites in the order in which a forward pass computes them; of both models, `model` comes first."""
    kind, layer = parse(site)
    return layer, KINDS.index(kind), of_base(site)


def num_layers(hf_config: Any) -> int:
    """Number of blocks of a transformers configuration (of its text part, if it has several)."""
    return hf_config.get_text_config().num_hidden_layers


def width(hf_config: Any) -> int:
    """Width of every site of a transformers configuration."""
    return hf_config.get_text_config().hidden_size


def locate(hf_model: Any, site: str) -> tuple[str, str]:
    """(module path, "input" | "output") of a site in a transformers model. Raises UserError on an unknown one."""
    kind, layer = parse(site)
    family = hf_model.config.model_type
    if family not in FAMILIES:
        raise UserError(f"model.name: models of type {family!r} are not known; allowed: {', '.join(sorted(FAMILIES))}")
    layers = num_layers(hf_model.config)
    if layer >= layers:
        raise UserError(f"site {site!r}: the model has {layers} layers; allowed: 0 to {layers - 1}")
    blocks, places = FAMILIES[family]
    inner, end = places[kind]
    return ".".join(filter(None, [blocks, str(layer), inner])), end
