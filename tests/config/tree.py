"""Walking the settings: every section, every field, with the dotted path where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xlc_ray.config import Config
from xlc_ray.config.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs/presets").glob("*.yaml"))
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in sections_of(inner)]


def walk(section: type[BaseModel] = Config, path: str = "") -> Iterator[tuple[str, type[BaseModel], str, FieldInfo]]:
    """(dotted path, section, name, field) of every field, sections and leaves alike."""
    for name, field in section.model_fields.items():
        here = f"{path}.{name}".lstrip(".")
        yield here, section, name, field
        for inner in sections_of(field.annotation):
            yield from walk(inner, here)


def everything() -> list[tuple[str, type[BaseModel], str, FieldInfo]]:
    """Likewise, of runs and of sweeps."""
    return [*walk(), *(found for found in walk(SweepConfig) if not found[0].startswith("base."))]


def leaves() -> list[tuple[str, type[BaseModel], str, FieldInfo]]:
    """The fields that hold values."""
    return [found for found in everything() if not sections_of(found[3].annotation)]
