"""A store from activations that another program made: rows of files become chunks, statistics and a held-out part.

The last rows are held out: contiguous ones, because rows drawn one by one would have neighbours of their own text among
those of training. Rows are permuted within their chunk, the same way at every site. A chunk of all sites is in memory,
and a block of each file. Such a store knows no text: `evaluate.windows` must be 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.manifest import FORMAT_VERSION, Manifest
from xlc_ray.activations.sites import order_key
from xlc_ray.activations.tensorfiles import Rows, find_rows
from xlc_ray.config import UserError
from xlc_ray.progress import Progress, size


def import_store(
    out: str,
    model: str,
    sites: Sequence[tuple[str, str]],
    *,
    held_out_fraction: float,
    chunk_tokens: int,
    dtype: str | None,
    binary: str | None,
    seed: int,
) -> dict[bool, Manifest]:
    """Make a store at `out` of `sites`, (site, FILE[:COLUMN]) each, row i of every site being of one token.

    `dtype` is that of the store; None is that of the files, where they have one (float64 becomes float32), else
    float32. `model` is the name of the language model. Interrupted, the same call goes on. Returns {held out?:
    manifest}; without the second where no row is held out. Raises UserError on sites that are none or of unequal rows,
    and on files that are missing or hold something else.
    """
    if not sites or chunk_tokens < 1 or not 0 <= held_out_fraction < 1 or seed < 0:
        raise UserError(
            "import: needs a --site, --chunk-tokens of 1 or more, --held-out-fraction in [0, 1) and --seed of 0 or more"
        )
    origin = dict(sites)
    if len(origin) < len(sites):
        raise UserError("import: two of --site have one name; all files of a site are one glob")
    found = {name: find_rows(origin[name], binary) for name in sorted(origin, key=order_key)}
    rows = {name: each for name, (each, _) in found.items()}
    total = _same_rows(rows)
    held_out = min(round(total * held_out_fraction), total - 1)
    identity = {
        "format_version": FORMAT_VERSION,
        "model": {"name": model},
        "sites": {name: each.width for name, each in rows.items()},
        "dtype": dtype or _common(rows),
        "seed": seed,
        "tokens": total,
        "chunk_tokens": chunk_tokens,
        "held_out_fraction": held_out_fraction,
        "imported": {name: _origin(origin[name], paths) for name, (_, paths) in found.items()},
    }
    # Training first, then held out: one pass over the files.
    splits = {False: (out, total - held_out), True: (files.join(out, "held_out"), held_out)}
    stream = {name: _Stream(each.blocks()) for name, each in rows.items()}
    made = {}
    with Progress("import", "rows", total) as progress:
        for is_held_out, (path, count) in splits.items():
            if count:
                done = 0 if not is_held_out else total - held_out
                made[is_held_out] = _write(path, identity | {"held_out": is_held_out}, count, stream, progress, done)
    return made


def described(out: str, made: Mapping[bool, Manifest]) -> Iterator[str]:
    """Lines about what `import_store` made at `out`."""
    for held_out, manifest in made.items():
        total = size(sum(chunk.bytes for chunk in manifest.chunks))
        yield f"{manifest.tokens:,} {'held-out' if held_out else 'training'} rows, {total}"
    yield f"{', '.join(made[False].sites)} at {out}"


def _same_rows(rows: Mapping[str, Rows]) -> int:
    counts = {each.count for each in rows.values()}
    if len(counts) > 1 or not min(counts):
        said = ", ".join(f"{name} {each.count:,}" for name, each in rows.items())
        raise UserError(f"import: every site needs the same rows, one or more: {said}")
    return counts.pop()


def _common(rows: Mapping[str, Rows]) -> str:
    dtypes = {each.dtype for each in rows.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return str(torch.float32 if dtype == torch.float64 else dtype).removeprefix("torch.")


def _origin(where: str, paths: list[str]) -> dict[str, Any]:
    # By the last names, as local models and texts are known: the files may lie elsewhere the next time.
    return {"from": Path(where).name, "files": len(paths), "bytes": sum(Path(path).stat().st_size for path in paths)}


def _write(
    path: str, identity: dict[str, Any], count: int, stream: Mapping[str, _Stream], progress: Progress, done: int
) -> Manifest:
    store.begin(path, identity)
    step = identity["chunk_tokens"]
    plan = [min(step, count - start) for start in range(0, count, step)]
    store.write_plan(path, plan)
    missing = set(store.missing_chunks(path, len(plan)))
    for index, rows in enumerate(plan):
        taken = {name: each.take(rows) for name, each in stream.items()}
        if index in missing:
            mix = torch.from_numpy(
                np.random.default_rng([identity["seed"], identity["held_out"], index]).permutation(rows)
            )
            encoded = {name: store.encode(values[mix], identity["dtype"], name) for name, values in taken.items()}
            store.write_chunk(path, index, encoded, identity["dtype"])
        done += rows
        progress.update(done, done)
    return store.finish(path, identity)


class _Stream:
    """Blocks of rows, cut anew."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._rest: Tensor | None = None

    def take(self, rows: int) -> Tensor:
        """The next rows."""
        parts, have = [], 0
        while have < rows:
            block = next(self._blocks) if self._rest is None else self._rest
            parts.append(block[: rows - have])
            self._rest = block[rows - have :] if len(block) > rows - have else None
            have += len(parts[-1])
        return torch.cat(parts)
