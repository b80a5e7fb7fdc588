"""Known answers beside exported weights, so that anyone can check a port: golden.safetensors.

    inputs [S, B, d]      rows of each site read, raw units
    features [G, B, F]    of each group of features, in the units of the exported weights
    outputs [T, B, d]     of each site written, raw units; for a CLT S = G = T = layers

The names of the sites are in the file's metadata, which also says where the rows are from.
"""

from __future__ import annotations

from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.activations.store import decode, is_there, open_store
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary

FILE = "golden.safetensors"
ROWS = 32


class Rows(NamedTuple):
    """Rows [B, d] of every site that is read, and where they are from."""

    values: dict[str, Tensor]
    origin: str


def rows(dictionary: Dictionary, config: Config) -> Rows:
    """Held-out rows of the run's store if it is there, else seeded Gaussian ones with the sites' mean and scale."""
    sites = dictionary.wiring.read_sites
    path = files.join(config.source.path, "held_out")
    if is_there(path):
        store = open_store(path)
        if set(sites) <= set(store.manifest.sites):
            found = store.read(0, 0, min(ROWS, store.chunk_rows[0]), sites)
            return Rows({site: decode(value, store.dtype) for site, value in found.items()}, "held-out rows")
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(ROWS, len(dictionary.read_mean), generator=generator)
    raw = noise * dictionary.read_scale.float() + dictionary.read_mean.float()
    return Rows({s: raw[:, cols] for s, cols in dictionary.wiring.columns(sites).items()}, "Gaussian rows")


@torch.no_grad()
def write(made: Dictionary, rows: Rows, out: str) -> None:
    """Write the file for a dictionary as exported: folded, so that its inputs and outputs are raw."""
    x = made.normalize_inputs(rows.values)
    features = made.encode(x)
    written = made.denormalize(made.decode(features, x))
    tensors = {
        "inputs": torch.stack([rows.values[site] for site in made.wiring.read_sites]),
        "features": torch.stack([f.dense() for f in features]),
        "outputs": torch.stack([written[site] for site in made.wiring.written_sites]),
    }
    facts = {
        "inputs": " ".join(made.wiring.read_sites),
        "outputs": " ".join(made.wiring.written_sites),
        "rows": rows.origin,
    }
    plain = {name: value.float().contiguous() for name, value in tensors.items()}
    files.write_bytes(files.join(out, FILE), safetensors.torch.save(plain, metadata=facts))
