"""One line for the user: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError


class UserError(ValueError):
    """Something the user can mend. Its message is one line; a job prints it and exits with status 2."""


def nearest(name: str, choices: list[str]) -> str:
    """' (did you mean X? …)' for the closest choice, with the choices."""
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]}? " if match else ""
    return f"{hint}allowed: {', '.join(sorted(choices))}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError where the file is missing or is not one."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation, as 'path: what; allowed: …' (and how many more there are)."""
    # An unknown key explains the missing one that it was meant to be, so it goes first.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    first, more = problems[0], len(problems) - 1
    line = _one(first, model)
    return line + (f" (and {more} more)" if more else "")


def _one(problem: Any, model: type[BaseModel]) -> str:
    path, owner = _place(problem["loc"], model)
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path}: unknown setting; {nearest(path.rsplit('.', 1)[-1], list(owner.model_fields))}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "union_tag_invalid":
        tags = [t.strip(" '") for t in context["expected_tags"].split(",")]
        return f"{path}.kind: {context['tag']!r} is unknown; {nearest(context['tag'], tags)}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    return f"{path}: {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _place(loc: tuple[Any, ...], model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Dotted path of a problem without pydantic's union markers, and the section that holds it."""
    names, owner = [], model
    for i, part in enumerate(loc):
        field = owner.model_fields.get(part) if isinstance(part, str) else None
        sections = [t for t in _types(field.annotation) if _is_section(t)] if field else []
        tagged = {t.model_fields["kind"].default: t for t in _siblings(names, model) if "kind" in t.model_fields}
        if part in tagged and not field:
            owner = tagged[part]
            continue
        if isinstance(part, str) and i and not field and "[" in part:  # a marker such as 'function-after[…]'
            continue
        names.append(str(part))
        if sections:
            owner = sections[0]
    return ".".join(names), owner


def _siblings(names: list[str], model: type[BaseModel]) -> list[type[BaseModel]]:
    """The sections that may stand at a dotted path."""
    here = [model]
    for name in names:
        here = [t for s in here if name in s.model_fields for t in _types(s.model_fields[name].annotation)]
        here = [t for t in here if _is_section(t)]
    return here


def _types(annotation: Any) -> list[Any]:
    found = [t for arg in get_args(annotation) for t in _types(arg)]
    return found or [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
