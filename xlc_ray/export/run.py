"""A trained run in another program's format: weights, known answers, a model card."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.config.errors import nearest
from xlc_ray.dictionary import checkpoint
from xlc_ray.export import golden, hub, saelens
from xlc_ray.export.formats import WRITERS


def export(run_dir: str, form: str, out: str, push_to_hub: str | None) -> str:
    """Write a run's newest checkpoint to the new directory `out`, and push that to the Hub if asked.

    Returns what was done, a line each. Raises UserError on a format that is not known or cannot express the dictionary,
    on an `out` that holds something, where the Hub does not know the user, and where a file of the run is damaged: all
    of it before anything is written.
    """
    if form not in WRITERS:
        raise UserError(f"--format {form}: unknown; {nearest(form, list(WRITERS))}")
    if held := files.listdir(out):
        raise UserError(f"--out {out}: holds {held[0]} already; give a new directory")
    if push_to_hub:
        if files.is_url(out):
            raise UserError(f"--push-to-hub {push_to_hub}: {out} is a URL; give a local --out")
        hub.check(push_to_hub)
    dictionary, config = checkpoint.load_dictionary(run_dir)
    densities = _densities(run_dir) if form == saelens.NAME else None
    known, metrics = golden.rows(dictionary, config), _metrics(run_dir)
    made = WRITERS[form](dictionary, config, out)
    if densities:
        saelens.write_densities(made, densities, out)
    golden.write(made, known, out)
    files.write_bytes(files.join(out, hub.CARD), hub.card(made, config, form, metrics, push_to_hub).encode())
    said = f"{form}: {made.wiring.groups} x {made.sizes[0]:,} features of {config.dictionary.wiring.kind} in {out}\n"
    said += f"{golden.FILE}: {len(next(iter(known.values.values())))} {known.origin}"
    return said + (f"\npushed: {hub.push(out, push_to_hub)}" if push_to_hub else "")


def _metrics(run_dir: str) -> dict[str, Any] | None:
    """What eval.json says, if the run was evaluated."""
    name = files.join(run_dir, "eval.json")
    if not files.exists(name):
        return None
    found = files.read_mapping(name)
    if type(found.get("tokens")) is not int:
        raise UserError(f"{name}: tokens is {found.get('tokens')!r}, not a count; evaluate the run again")
    return found


def _densities(run_dir: str) -> list[Tensor] | None:
    """Share of tokens at which each feature is active, a tensor [F] a group, if the run was evaluated."""
    name = files.join(run_dir, "features.parquet")
    if not files.exists(name):
        return None
    raw = io.BytesIO(files.read_bytes(name))
    try:
        table = pq.read_table(raw, columns=["group", "density"])
    except (OSError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{name}: cannot be read as .parquet: {said}; evaluate the run again") from None
    group, density = (torch.from_numpy(table[key].to_numpy().copy()) for key in ("group", "density"))
    return [density[group == g] for g in range(int(group.max()) + 1)]
