"""Scores that compare features by how unusual their pre-activations are:  z = (pre - mean) / (std + 1e-6).

mean and std [F] of each feature over the tokens of the global batch (std unbiased), as crosslayer-coding ranks entries.
At inference a token must not depend on others: there both are running means of the training batches' values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xlc_ray.dictionary.selection import Tiles
from xlc_ray.dictionary.shards import Shards

LEAST_SPREAD = 1e-6


def mean_so_far(mean: Tensor, parts: int, new: Tensor) -> Tensor:
    """The mean over one part more; of the first it is that part, bit for bit."""
    return (mean * parts + new) / (parts + 1) if parts else new


class ZScores(nn.Module):
    """`sizes`: features of each group on this rank. The running values are parameters without gradient, so that they
    are split, saved and loaded like all that belongs to features."""

    mean: Sequence[nn.Parameter]
    std: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards):
        super().__init__()
        self.sizes, self.shards = sizes, shards
        for name, start in (("mean", torch.zeros), ("std", torch.ones)):
            values = nn.ParameterList([nn.Parameter(start(n), requires_grad=False) for n in sizes])
            setattr(self, name, values)
        self._batch: list[tuple[Tensor, Tensor]] = []
        self._step: list[tuple[Tensor, Tensor]] = []
        self._parts = 0  # of this step's batch, so far

    @torch.no_grad()
    def observe(self, tiles: Tiles) -> None:
        """Take mean and std of all tokens of the global batch (with replicas: one collective)."""
        sums = [torch.zeros(2, n, dtype=torch.float64, device=self.mean[g].device) for g, n in enumerate(self.sizes)]
        tokens = 0
        for tile in tiles(False):
            tokens = tile.tokens
            sums[tile.g] += torch.stack([tile.pre.double().sum(dim=0), tile.pre.double().square().sum(dim=0)])
        flat = torch.cat(sums, dim=1)
        self.shards.mean_over_replicas_(flat)
        tokens_of_all = tokens * self.shards.replicas
        mean, square = flat * self.shards.replicas / max(1, tokens_of_all)
        variance = (square - mean.square()).clamp(min=0) * tokens_of_all / max(1, tokens_of_all - 1)
        each = zip(mean.split(self.sizes), variance.sqrt().split(self.sizes), strict=True)
        self._batch = [(m.to(p.dtype), s.to(p.dtype)) for (m, s), p in zip(each, self.mean, strict=True)]
        before = self._step if self._parts else self._batch
        self._step = [
            (mean_so_far(mean, self._parts, m), mean_so_far(std, self._parts, s))
            for (mean, std), (m, s) in zip(before, self._batch, strict=True)
        ]
        self._parts += 1

    def of(self, pre: Tensor, g: int) -> Tensor:
        """Scores [b, F] of a tile's pre-activations: by this batch in training, by the running values at inference."""
        mean, std = self._values(g)
        return (pre - mean) / (std + LEAST_SPREAD)

    def undo(self, score: Tensor, g: int) -> Tensor:
        """The pre-activation [F] of each feature that has this score."""
        mean, std = self._values(g)
        return score * (std + LEAST_SPREAD) + mean

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Move the running values towards those of the last batch (the means over its micro-batches):
        new = decay · old + (1 - decay) · batch."""
        self._parts = 0
        for (mean, std), m, s in zip(self._step, self.mean, self.std, strict=True):
            m.mul_(decay).add_(mean, alpha=1 - decay)
            s.mul_(decay).add_(std, alpha=1 - decay)

    def _values(self, g: int) -> tuple[Tensor, Tensor]:
        return self._batch[g] if self.training else (self.mean[g].detach(), self.std[g].detach())
