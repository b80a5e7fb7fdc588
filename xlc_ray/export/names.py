"""Names for others: sites as TransformerLens has them ("mlp_out.3" is "blocks.3.hook_mlp_out"), models without paths.

`mlp.hook_in` is what the MLP itself reads. `ln2.hook_normalized` is none of our sites: it comes before the gain of an
RMSNorm, and where a LayerNorm is folded before its gain and bias, of which files say nothing; so it keeps its name.
`hook_mlp_out` is what is added to the residual stream, in Gemma after the norm.
"""

from __future__ import annotations

import os
import re

from xlc_ray import files
from xlc_ray.activations.sites import KINDS
from xlc_ray.config import Config

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_SITES = {hook: kind for kind, hook in HOOKS.items()} | {"mlp.hook_out": "mlp_out"}


def kind_and_layer(site: str) -> tuple[str, int] | None:
    """("mlp_in", 3) of "mlp_in.3", None for a site with a name of another form."""
    kind, _, layer = site.rpartition(".")
    return (kind, int(layer)) if kind in KINDS and layer.isdecimal() else None


def hook_of(site: str) -> str:
    """The hook's full name; a site with a name of another form keeps it."""
    found = kind_and_layer(site)
    return f"blocks.{found[1]}.{HOOKS[found[0]]}" if found else site


def site_of(hook: str) -> str:
    """The site of a hook's full name; hooks that are none of our sites keep their names."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return f"{_SITES[found[2]]}.{found[1]}" if found and found[2] in _SITES else hook


def site_of_layer(hook: str, layer: int) -> str:
    """The site of a hook that is named without its layer, as in `feature_input_hook: mlp.hook_in`."""
    return site_of(f"blocks.{layer}.{hook}")


def public(name: str) -> str:
    """A name on the Hub as it is; of a local path or a URL the last part alone, for the rest concerns nobody else."""
    return files.name(name) if "://" in name or os.path.isabs(name) or os.path.exists(name) else name


def model_name(config: Config) -> str:
    """The language model's name, without the path of a local one."""
    return public(config.model.name)
