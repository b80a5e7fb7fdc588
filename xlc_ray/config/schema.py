"""JSON Schemas of all settings, by which editors complete and check the YAML.

python -m xlc_ray.config.schema > configs/schema.json
python -m xlc_ray.config.schema sweep > configs/sweeps/schema.json

The first is Config's own, and `preset`. What a preset may decide (dictionary, train) need not be in the file, at any
depth; without a preset the settings of these two sections themselves do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from xlc_ray.config import Config, presets
from xlc_ray.config.sweep import SweepConfig

DECIDED = ("Dictionary", "Train")
"""Sections that presets speak of."""


def schema() -> dict[str, Any]:
    """The schema of a run's file as a tree."""
    tree = Config.model_json_schema()
    sections = tree["$defs"]
    missing = {name.lower(): {"required": sections[name]["required"]} for name in DECIDED}
    for name in set(_reached(sections, DECIDED)):
        sections[name].pop("required", None)
        for field in sections[name].get("properties", {}).values():
            _any_kind(field)
    description = "A paper's or program's settings, under those of this file."
    preset = {"default": None, "description": description, "enum": [*presets.names(), None], "title": "Preset"}
    tree["properties"] = {"preset": preset} | tree["properties"]
    tree["if"] = {"properties": {"preset": {"type": "string"}}, "required": ["preset"]}
    tree["else"] = {"properties": missing}
    return tree


def _reached(sections: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """These sections and all inside them."""
    for name in names:
        yield name
        inner = tuple(ref.rpartition("/")[2] for ref in _refs(sections[name]))
        yield from _reached(sections, inner)


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        node = list(node.values())
    for item in node if isinstance(node, list) else ():
        yield from _refs(item)


def _any_kind(field: Any) -> None:
    """Without its `kind`, which the preset may give, a section may fit several of a union."""
    if isinstance(field, dict):
        if "oneOf" in field:
            field["anyOf"] = field.pop("oneOf")
            del field["discriminator"]
        field = list(field.values())
    for item in field if isinstance(field, list) else ():
        _any_kind(item)


def text() -> str:
    """What stands in configs/schema.json."""
    return _text(schema())


def sweep_text() -> str:
    """What stands in configs/sweeps/schema.json."""
    tree = SweepConfig.model_json_schema()
    base = tree["properties"]["base"]
    tree["properties"]["base"] = {"anyOf": [{"type": "string"}, {"$ref": base["$ref"]}]} | {
        "description": base["description"]
    }
    return _text(tree)


def _text(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(sweep_text() if sys.argv[1:] == ["sweep"] else text(), end="")
