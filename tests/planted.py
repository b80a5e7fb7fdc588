"""Activations whose true features are known: sparse codes times unit directions that were drawn at random.

Each group of a wiring has `n` true features: a direction in what it reads and another in what it writes (one, where it
writes what it reads), a frequency (ten times as high for the most frequent as for the rarest), and sizes between 0.5
and 1.5. There are more directions than dimensions, so that no linear map finds them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from xlc_ray.dictionary import Dictionary, Wiring


class Planted:
    """`n` true features a group of `wires`, of which a token has `active` in the mean; every site has E|x|² = d."""

    def __init__(self, wires: Wiring, n: int, active: float, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)

        def directions(sites: tuple[str, ...]) -> Tensor:
            return nnf.normalize(torch.randn(n, wires.width(sites), generator=draw), dim=1)

        self.wires = wires
        self.read = [directions(sites) for sites in wires.reads]
        same = [reads == writes for reads, writes in zip(wires.reads, wires.writes, strict=True)]
        self.write = [self.read[g] if same[g] else directions(wires.writes[g]) for g in range(wires.groups)]
        self._made = [[self.write[g]] if same[g] else [self.read[g], self.write[g]] for g in range(wires.groups)]
        frequency = torch.logspace(0, -1, n)
        self.frequency = frequency * active / frequency.sum()
        self._scale = dict.fromkeys(wires.widths, torch.tensor(1.0))
        self._scale = {s: (x.shape[1] / x.square().sum(1).mean()).sqrt() for s, x in self.batch(-1, 20000).items()}

    def batch(self, step: int, rows: int) -> dict[str, Tensor]:
        """Activations [rows, d] of each site; those of a step are always the same."""
        draw = torch.Generator().manual_seed(10**6 + step)
        found = {site: torch.zeros(rows, width) for site, width in self.wires.widths.items()}
        for g, made in enumerate(self._made):
            on = torch.rand(rows, len(self.frequency), generator=draw) < self.frequency
            code = on * (0.5 + torch.rand(on.shape, generator=draw))
            for sites, rows_of in zip((self.wires.reads[g], self.wires.writes[g])[-len(made) :], made, strict=True):
                for site, where in self.wires.columns(sites).items():
                    found[site] += code @ rows_of[:, where]
        return {site: x * self._scale[site] for site, x in found.items()}

    @torch.no_grad()
    def cosines(self, dictionary: Dictionary) -> list[Tensor]:
        """Of each group's true features [n]: the largest cosine with a decoder row of the group."""
        found = []
        for g, true in enumerate(self.write):
            scale = torch.cat([self._scale[s].expand(self.wires.widths[s]) for s in self.wires.writes[g]])
            learnt = nnf.normalize(dictionary.groups[g].W_dec, dim=1)
            found.append((nnf.normalize(true * scale, dim=1) @ learnt.T).amax(dim=1))
        return found
