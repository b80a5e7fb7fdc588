"""No setting is dead: each is read by the code behind, each of its choices is known there, each default stated once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import pytest
import torch

from tests.config.tree import ROOT, everything, leaves, sections_of, walk
from xlc_ray.config.sweep import Axis

SOURCES = [*(ROOT / "jobs").glob("*.py"), *(ROOT / "xlc_ray").rglob("*.py")]
TREES = [ast.parse(file.read_text()) for file in SOURCES if "config" not in file.relative_to(ROOT).parts]
NODES = [node for tree in TREES for node in ast.walk(tree)]
READ = {node.attr for node in NODES if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
MATCHED = {name for node in NODES if isinstance(node, ast.MatchClass) for name in node.kwd_attrs}
CLASSES = {node.cls.attr if isinstance(node.cls, ast.Attribute) else node.cls.id for node in NODES
           if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Attribute | ast.Name)}  # fmt: skip
WORDS = {node.value for node in NODES if isinstance(node, ast.Constant) and isinstance(node.value, str)}
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]

AXES = set(Axis.model_fields) - {"when"}
HANDED_ON = {"train.wandb.mode"}
"""Settings whose choices another library tells apart."""
NEUTRAL = {("replicas", "1")}
"""Parameters whose default means "not at all", which happens to be the setting's default too."""


def test_every_setting_is_read():
    known = READ | MATCHED | {"kind", *AXES}  # an axis knows its kind itself
    assert sorted({path for path, _, name, _ in everything() if name not in known}) == []


def test_no_module_is_the_twin_of_another():
    """Pitfall 28."""
    twins = re.compile(r"_(old|new|v\d+|optimized|distributed)$")
    assert twins.search("learner_v2")
    assert [str(file) for file in SOURCES if twins.search(file.stem)] == []


def test_every_kind_of_a_section_is_told_apart():
    tagged = [(path, s) for path, _, _, f in walk() if len(found := sections_of(f.annotation)) > 1 for s in found]
    assert len(tagged) > 9
    assert [(path, s.__name__) for path, s in tagged if s.__name__ not in CLASSES] == []


def choices_of(annotation) -> list[str]:
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for inner in get_args(annotation) for choice in choices_of(inner)]


@pytest.mark.parametrize("path", sorted({path for path, *_, field in leaves() if choices_of(field.annotation)}))
def test_every_choice_of_a_setting_is_told_apart(path):
    choices = {c for p, *_, field in leaves() if p == path for c in choices_of(field.annotation)}
    if path.endswith(".kind") and len({s for p, s, *_ in leaves() if p == path}) > 1:
        test_every_kind_of_a_section_is_told_apart()
    elif path not in HANDED_ON and not all(isinstance(getattr(torch, c, None), torch.dtype) for c in choices):
        assert len(choices - WORDS) <= 1, "at most one choice can be what is left"


def test_no_parameter_restates_a_default():
    # A parameter named like a setting takes the setting's value: the same default once more would be a second one.
    stated: dict[str, set[str]] = {}
    for _, _, name, field in leaves():
        if not field.is_required() and field.default is not None:
            stated.setdefault(name, set()).add(repr(field.default))
    restated = [
        f"{name}({argument}={default})"
        for name, argument, default in parameters_with_defaults()
        if default in stated.get(argument, ()) and (argument, default) not in NEUTRAL
    ]
    assert restated == []


def parameters_with_defaults() -> Iterator[tuple[str, str, str]]:
    """(function, parameter, source text of its default)."""
    for function in FUNCTIONS:
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        first = len(positional) - len(arguments.defaults)
        pairs = [*zip(positional[first:], arguments.defaults, strict=True)]
        pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        for argument, default in pairs:
            if default is not None:
                yield getattr(function, "name", "lambda"), argument.arg, ast.unparse(default)
