"""Presets: the settings that a paper or a program decides, each a YAML file in this folder.

`preset: NAME` in a file puts them under what the file says: preset < file < overrides. A mapping is merged into the
preset's key by key, unless it names another `kind`: then it replaces it whole, as lists, numbers and null do.

A Config holds the values and not the name: what a run writes is read back without a preset, and none counts twice.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from xlc_ray.config import yaml_text
from xlc_ray.config.errors import UserError, nearest


def names() -> list[str]:
    """All presets, in the order of the alphabet."""
    return sorted(file.name[:-5] for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))


def settings_of(name: Any, origin: str) -> dict[str, Any]:
    """The tree of a preset. Raises UserError, naming `origin` and the nearest, for one that there is not."""
    if name not in (known := names()):
        raise UserError(f"{origin}: preset: {name!r} is unknown; {nearest(str(name), known)}")
    file = f"{name}.yaml"
    return yaml_text.parse_mapping(resources.files(__name__).joinpath(file).read_bytes(), file)


def under(tree: dict[str, Any], name: Any, origin: str) -> dict[str, Any]:
    """A tree with a preset under it. Raises UserError where the tree leaves the preset nothing to decide."""
    found = merge(settings_of(name, origin), tree)
    if found == tree:
        raise UserError(f"{origin}: preset: {name} decides nothing, because the file gives each of its settings itself")
    return found


def merge(base: Any, over: Any) -> Any:
    """`over` with what `base` says beside it: mappings key by key, unless they are of two kinds."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if over.get("kind", base.get("kind")) != base.get("kind"):
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}
