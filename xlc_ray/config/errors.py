"""One line for the user: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Loc = tuple[Any, ...]


class UserError(ValueError):
    """Something the user can mend. Its message is one line; a job prints it and exits with status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(part.strip() for part in message.splitlines()))


class Unreachable(UserError):
    """What may be there again later: a file system or a server that did not answer for as long as it was asked."""


def nearest(name: str, choices: list[str]) -> str:
    """'did you mean X? allowed: …' for a name that is none of the choices."""
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]}? " if match else ""
    return f"{hint}allowed: {', '.join(sorted(choices))}"


def unknown(path: str, model: type[BaseModel]) -> str | None:
    """What is wrong with a dotted path that no settings have, whatever the kinds of their sections; None of others."""
    here: list[Any] = [model]
    for name in path.split("."):
        fields = [section.model_fields[name] for section in here if name in section.model_fields]
        if not fields:
            allowed = {field for section in here for field in section.model_fields}
            return f"{path}: unknown setting; {nearest(name, sorted(allowed))}"
        inner = [kind for field in fields for kind in _types(field.annotation)]
        if Any in inner:  # a mapping of the user's own
            return None
        here = [kind for kind in inner if _is_section(kind)]
    return None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a validation, as 'path: what; allowed: …' (and how many more there are)."""
    # An unknown key explains the missing one that it was meant to be, so it goes first.
    problems = sorted(error.errors(), key=lambda p: p["type"] not in ("extra_forbidden", "invalid_key"))
    line = _one(problems[0], model)
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")


def _one(problem: Any, model: type[BaseModel]) -> str:
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        *inside, key = problem["loc"]
        path, owner = _place(tuple(inside), model)
        return f"{_dotted(path, key) or repr(key)}: unknown setting; {nearest(str(key), list(owner.model_fields))}"
    path, _ = _place(problem["loc"], model)
    names = path.split(".")
    shown = reprlib.repr(value) if not isinstance(value, str) else repr(_short(value))
    if kind == "missing":
        return f"{path}: missing"
    if kind == "union_tag_invalid":
        return f"{path}.kind: {_short(context['tag'])!r} is unknown; {nearest(context['tag'], _tags(names, model))}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing; allowed: {', '.join(_tags(names, model))}"
    if kind == "literal_error" and len(choices := [c.strip("'") for c in _choices(context["expected"])]) > 1:
        return f"{path}: {shown} is unknown; {nearest(str(value), choices)}"
    if kind in ("model_type", "model_attributes_type"):
        tags = _tags(names, model)
        wanted = f"a mapping with kind: {', '.join(tags)}" if tags else "a mapping of settings"
        return f"{path}: {shown} should be {wanted}"
    if kind == "value_error":
        return f"{path}: {context['error']}" if path else str(context["error"])
    message = problem["msg"]
    return f"{path}: {shown} {message[6:]}" if message.startswith("Input ") else f"{path}: {shown}: {message.lower()}"


def _choices(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").split(", ")


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _dotted(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _place(loc: Loc, model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """Dotted path of a problem without pydantic's tags of unions, and the section that holds it."""
    names: list[str] = []
    owner = model
    for part in loc:
        field = owner.model_fields.get(part) if isinstance(part, str) else None
        tagged = {} if field else {_tag(s): s for s in _siblings(names, model)}
        if part in tagged:
            owner = tagged[part]
            continue
        names.append(str(part))
        sections = [t for t in _types(field.annotation) if _is_section(t)] if field else []
        owner = sections[0] if sections else owner
    return ".".join(names), owner


def _tags(names: list[str], model: type[BaseModel]) -> list[str]:
    """Kinds of the tagged sections that may stand at a path."""
    return sorted(tag for s in _siblings(names, model) if (tag := _tag(s)))


def _tag(section: type[BaseModel]) -> str | None:
    """The tag of a section in a union; None for one that is not in any."""
    kind = section.model_fields.get("kind")
    return kind.default if kind and isinstance(kind.default, str) and len(get_args(kind.annotation)) == 1 else None


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
