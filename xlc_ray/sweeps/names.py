"""Names of trials: what differs at a point, as in `batchtopk,k=32,lr=0.002`."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from xlc_ray.config.sweep import SweepConfig

LONGEST = 96


def name_of(sweep: SweepConfig, changes: dict[str, Any]) -> str:
    """What differs at this point: last names of paths, kinds of sections. What cases set under `cluster` is told only
    where nothing else tells them apart. Long ones are cut and end with a hash."""
    options = {path: list(axis.values or ()) for path, axis in sweep.space.items()}
    for case in sweep.cases:
        for path, value in case.items():
            options.setdefault(path, []).append(value)
    apart = {repr(sorted((p, v) for p, v in case.items() if not _of_cluster(p))) for case in sweep.cases}
    quiet = len(apart) == len(sweep.cases)
    lasts = [path.rsplit(".", 1)[-1] for path in options]
    parts = []
    for path, value in changes.items():
        last = path.rsplit(".", 1)[-1]
        label = last if lasts.count(last) == 1 else path
        told = len({repr(v) for v in options[path]}) > 1 or len(sweep.cases) > len(options[path])
        if path in sweep.space or (told and not (quiet and _of_cluster(path))):
            parts += _section(value, options[path]) if isinstance(value, dict) else [f"{label}={_plain(value)}"]
    name = re.sub(r"[^\w.,=+-]", "_", ",".join(parts)) or "base"
    if len(name) > LONGEST:
        return f"{name[: LONGEST - 9]}-{short_hash(name)}"
    return name


def _of_cluster(path: str) -> bool:
    return path.split(".")[0] == "cluster"


def short_hash(text: str) -> str:
    """Eight digits that differ where texts do."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _section(value: dict[str, Any], options: list[Any]) -> list[str]:
    """A section by its kind, and what sets it apart from the other options of that kind."""
    kind = value.get("kind")
    alike = [o for o in options if isinstance(o, dict) and o.get("kind") == kind]
    apart = [key for key in value if key != "kind" and any(o.get(key) != value[key] for o in alike)]
    return ([str(kind)] if kind else []) + [f"{key}={_plain(value[key])}" for key in apart]


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, list | tuple):
        return "+".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
