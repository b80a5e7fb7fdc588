"""YAML as a person means it: 3e-4 is a number (YAML 1.1 takes it for a word), and a key given twice is a mistake."""

from __future__ import annotations

import re
from typing import Any

import yaml

from xlc_ray.config.errors import UserError

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the words that _Loader would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_mapping(text: bytes, origin: str) -> dict[str, Any]:
    """The mapping in a YAML text; `origin` names it in errors. Raises UserError where it is not one."""
    tree = parse(text, origin)
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def parse(text: bytes | str, origin: str) -> Any:
    """Any YAML value. Raises UserError, naming `origin` and the line."""
    try:
        return copy(yaml.load(text, _Loader))
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{origin}: not YAML: {line}{error.problem}") from None
    # Dates and numbers that do not exist are ValueErrors of Python's constructors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not YAML: {error}") from None


def dump(tree: dict[str, Any]) -> str:
    """YAML that `parse_mapping` reads back as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def copy(value: Any, inside: tuple[Any, ...] = ()) -> Any:
    """A deep copy of mappings and lists in which nothing is shared: a YAML alias becomes a value of its own."""
    if any(value is outer for outer in inside):
        raise ValueError("a value that contains itself")
    if isinstance(value, dict):
        return {key: copy(item, (*inside, value)) for key, item in value.items()}
    if isinstance(value, list):
        return [copy(item, (*inside, value)) for item in value]
    return value
