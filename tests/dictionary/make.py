"""Small random dictionaries in float64, and wirings drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Dictionary, Shards, Wiring
from xlc_ray.dictionary.build import build
from xlc_ray.dictionary.selection import Tile, cut, positions, take
from xlc_ray.dictionary.shards import Limit
from xlc_ray.dictionary.sparse import Support


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def section(gate: dict | None = None, **changes) -> settings.Dictionary:
    """The section `dictionary` of the settings."""
    tree = {"wiring": {"kind": "clt"}, "features": 7, "gate": gate or {"kind": "relu"}, "decoder_norm": 0.7}
    return settings.Dictionary.model_validate(tree | changes)


def dictionary(wires: Wiring, gate: dict | None = None, seed: int = 0, **changes) -> Dictionary:
    """A whole dictionary in training form whose every parameter is random, biases and skips too."""
    made = build(section(gate, **changes), wires, seed, Shards()).double()
    noise = generator(seed + 1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "b_" in name or "r_mag" in name or "skip" in name:
                p += 0.3 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
            if "raw_threshold" in name:
                p += 0.1 * torch.rand(p.shape, generator=noise, dtype=p.dtype)
    return made


def activations(wires: Wiring, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Correlated neither over dimensions nor sites, but with a mean and a spread of its own in every dimension."""
    draw = generator(seed + 100)
    made = {}
    for site, width in wires.widths.items():
        spread, mean = torch.rand(2, width, generator=draw, dtype=torch.float64) * 4 + 0.5
        made[site] = torch.randn(rows, width, generator=draw, dtype=torch.float64) * spread + mean
    return made


def support(mask: torch.Tensor) -> Support:
    """The entries at which a mask is set."""
    return Support(positions(mask), (mask.shape[0], mask.shape[1]))


def within(values: torch.Tensor, limit: Limit) -> torch.Tensor:
    """The mask of what a limit a row lets a rank keep of its candidates."""
    tile = Tile(0, 0, values.shape[0], lambda: values)
    picked = {0: take(tile, values, values > 0)}
    cut(picked, [0], limit, by_token=True)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask.view(-1)[picked[0].entry] = True
    return mask


@dataclass
class Statistics:
    """What a store knows of a site."""

    count: int
    mean: np.ndarray
    std: np.ndarray
    mean_norm: float | None


def statistics(batch: dict[str, torch.Tensor]) -> dict[str, Statistics]:
    return {
        site: Statistics(len(v), v.mean(0).numpy(), v.std(0).numpy(), v.norm(dim=1).mean().item())
        for site, v in batch.items()
    }


@st.composite
def wirings(draw) -> Wiring:
    """1 to 4 sites of ragged widths; 1 to 3 groups, each with its own sites in its own order."""
    names = list("abcd")[: draw(st.integers(1, 4))]
    widths = {name: draw(st.integers(1, 4)) for name in names}
    row = st.lists(st.sampled_from(names), min_size=1, unique=True).map(tuple)
    rows = st.lists(st.tuples(row, row), min_size=1, max_size=3)
    reads, writes = zip(*draw(rows), strict=True)
    return Wiring(widths, reads, writes)
