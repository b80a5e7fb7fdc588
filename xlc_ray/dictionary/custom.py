"""Gates and wirings of the user's own, named in the settings as `module:name`.

A gate is a subclass of `xlc_ray.dictionary.gates.Gate` made as `name(sizes, shards, **options)`; a wiring is a function
called as `name(layers, width, **options)` that returns an `xlc_ray.dictionary.Wiring`. Modules are looked for where
Python finds them, and in the working directory. Whoever loads such a run imports the module: keep it beside the run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from xlc_ray.config import UserError
from xlc_ray.dictionary.gates import Gate
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.wiring import Wiring


def gate(path: str, options: dict[str, Any], sizes: list[int], shards: Shards) -> Gate:
    """The user's gate for groups of these sizes. Raises UserError: no such module or name, no gate, other options."""
    made = _named(path, "dictionary.gate.path")
    if not (inspect.isclass(made) and issubclass(made, Gate)):
        raise UserError(f"dictionary.gate.path: {path} is no subclass of xlc_ray.dictionary.gates.Gate")
    if inspect.isabstract(made):
        missing = ", ".join(sorted(made.__abstractmethods__))
        raise UserError(f"dictionary.gate.path: {path} does not define {missing}")
    _check(made, "dictionary.gate.options", (sizes, shards), options)
    return made(sizes, shards, **options)


def wiring(path: str, options: dict[str, Any], layers: list[int], width: int) -> Wiring:
    """The user's wiring over these layers of a model. Raises UserError likewise."""
    make = _named(path, "dictionary.wiring.path")
    if not callable(make):
        raise UserError(f"dictionary.wiring.path: {path} is no function that returns a Wiring")
    _check(make, "dictionary.wiring.options", (layers, width), options)
    made = make(layers, width, **options)
    if not isinstance(made, Wiring):
        raise UserError(
            f"dictionary.wiring.path: {path} returned {type(made).__name__}, not an xlc_ray.dictionary.Wiring"
        )
    return made


def _named(path: str, setting: str) -> Any:
    module, _, name = path.partition(":")
    if (here := os.getcwd()) not in sys.path:  # `python jobs/train.py` looks beside the job only
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(f"{setting}: no module {module} in the working directory or where Python looks") from None
        raise
    if not hasattr(found, name):
        raise UserError(f"{setting}: module {module} has no {name!r}")
    return getattr(found, name)


def _check(made: Any, setting: str, given: tuple, options: dict[str, Any]) -> None:
    try:
        inspect.signature(made).bind(*given, **options)
    except TypeError as error:
        raise UserError(f"{setting}: {error}") from None
