"""Choosing entries from pre-activations that are never held whole.

Pre-activations come in tiles [b, F], a block of tokens and one group at a time, and each is forgotten when the entries
that may matter were taken from it. What is left are candidates: exact for a threshold, and for a contest of k places a
superset that all ranks then cut at the k-th largest value (Shards.kth_largest).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xlc_ray.dictionary.shards import Limit, Pool, Shards, largest

LEAST = 2.0**-126
"""The least score that can win a place: features are max(pre, 0)."""
SLACK = 5
"""Candidates of a batch are thinned out when there are so many times the places: n tiles alike leave ln n times."""


@dataclass
class Tile:
    """Pre-activations [b, F] of group `g` for the tokens from `first` on, of `tokens` in all; made when asked for."""

    g: int
    first: int
    tokens: int
    make: Callable[[], Tensor]

    @cached_property
    def pre(self) -> Float[Tensor, "b F"]:
        """The pre-activations."""
        return self.make()


Tiles = Callable[[bool], Iterator[Tile]]
"""Starts a pass over all tiles. True: blocks of tokens in order, in each block the groups in order; False: group after
group, in each the blocks of tokens in order."""


@dataclass(frozen=True)
class Picked:
    """Entries of one group of F `features`: `entry` = token · F + feature, ascending; what pre and score are there."""

    features: int
    entry: Int[Tensor, "n"]
    pre: Float[Tensor, "n"]
    score: Float[Tensor, "n"]

    @property
    def token(self) -> Int[Tensor, "n"]:
        """The token of each entry."""
        return self.entry // self.features

    def where(self, mask: Bool[Tensor, "n"]) -> Picked:
        """Some of the entries."""
        which = positions(mask)
        return Picked(self.features, self.entry[which], self.pre[which], self.score[which])

    @staticmethod
    def join(parts: list[Picked]) -> Picked:
        """Entries of consecutive blocks of tokens."""
        if len(parts) == 1:
            return parts[0]
        entry, pre, score = (torch.cat([getattr(p, key) for p in parts]) for key in ("entry", "pre", "score"))
        return Picked(parts[0].features, entry, pre, score)


def positions(mask: Bool[Tensor, "..."]) -> Int[Tensor, "n"]:
    """Flat indices at which a mask is set, ascending."""
    if mask.device.type == "cpu":  # numpy's flatnonzero is several times faster than torch's nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def take(tile: Tile, score: Float[Tensor, "b F"], mask: Bool[Tensor, "b F"]) -> Picked:
    """The entries of a tile at which a mask is set."""
    flat = positions(mask)
    pre = tile.pre.flatten()[flat]
    chosen = pre if score is tile.pre else score.flatten()[flat]
    features = tile.pre.shape[1]
    return Picked(features, flat + tile.first * features, pre, chosen)


def above(tiles: Tiles, lower: Callable[[int], Tensor | float], most: float) -> dict[int, Picked | None]:
    """Entries with pre > lower(g) ([F] or a number); None for a group where they are more than the share `most`."""
    return chosen(tiles, lambda tile: tile.pre > lower(tile.g), most)


def chosen(tiles: Tiles, test: Callable[[Tile], Tensor], most: float) -> dict[int, Picked | None]:
    """Entries that pass a test (tile → mask [b, F]); None for a group where they are more than the share `most`."""
    found: dict[int, list[Picked] | None] = {}
    count: Counter[int] = Counter()
    for tile in tiles(False):
        parts = found.setdefault(tile.g, [])
        if parts is None:
            continue
        mask = test(tile)
        count[tile.g] += int(mask.sum())
        if count[tile.g] > most * tile.tokens * mask.shape[1]:
            found[tile.g] = None
        else:
            parts.append(take(tile, tile.pre, mask))
    return {g: None if parts is None else Picked.join(parts) for g, parts in found.items()}


# ---------------------------------------------------------------- a budget of k a token


def best_of_tokens(
    tiles: Tiles, k: int, score: Callable[[Tile], Tensor], shared: bool, shards: Shards, extra: list[Pool]
) -> tuple[dict[int, Picked], list[Limit], list[Limit]]:
    """The k best positive scores of each token: of each group, or of all groups together (`shared`).

    Returns the entries, the limits of the contests, and those of `extra` pools that travel along."""
    found: dict[int, list[Picked]] = {}
    tops: dict[int, list[Tensor]] = {}
    for block in _blocks(tiles, shared):
        scores = [score(tile) for tile in block]
        top = Pool(torch.cat(scores, dim=1) if shared else scores[0], k).candidates()
        tops.setdefault(0 if shared else block[0].g, []).append(top)
        least = top.amin(dim=1, keepdim=True).clamp(min=LEAST)
        for tile, s in zip(block, scores, strict=True):
            found.setdefault(tile.g, []).append(take(tile, s, s >= least))
    picked = {g: Picked.join(parts) for g, parts in found.items()}
    pools = [Pool(torch.cat(parts), k) for parts in tops.values()]
    limits = shards.kth_largest(pools + extra)
    contests = [list(picked)] if shared else [[g] for g in picked]
    for groups, limit in zip(contests, limits, strict=False):
        cut(picked, groups, limit, by_token=True)
    return picked, limits[: len(pools)], limits[len(pools) :]


def _blocks(tiles: Tiles, shared: bool) -> Iterator[list[Tile]]:
    """Tiles that compete: all groups of a block of tokens, or each alone."""
    block: list[Tile] = []
    for tile in tiles(shared):
        if block and (not shared or tile.first != block[0].first):
            yield block
            block = []
        block.append(tile)
    yield block


# ---------------------------------------------------------------- a budget of k · B a batch


def best_of_batch(
    tiles: Tiles, places: int, score: Callable[[Tile], Tensor], shared: bool, shards: Shards, extra: list[Pool]
) -> tuple[dict[int, Picked], list[Limit], list[Limit]]:
    """The `places` best positive scores of the global batch: of each group, or of all groups together (`shared`)."""
    contests: list[dict[int, list[Picked]]] = []
    best, lower = None, LEAST
    for tile in tiles(False):
        if not contests or not (shared or tile.g in contests[-1]):
            contests.append({})
            best, lower = None, LEAST
        scores = score(tile)
        if best is None and scores.numel() > places:
            lower = max(LEAST, float(largest(scores.reshape(1, -1), places).amin()))
        found = take(tile, scores, scores >= lower)
        contests[-1].setdefault(tile.g, []).append(found)
        best = found.score if best is None else torch.cat([best, found.score])
        if best.numel() > places:  # what is not among the best of a part is not of the whole
            best = largest(best.unsqueeze(0), places).squeeze(0)
            lower = float(best.amin())
        if sum(p.entry.numel() for parts in contests[-1].values() for p in parts) > SLACK * places:
            _thin(contests[-1], lower)
    joined = [{g: Picked.join(parts) for g, parts in found.items()} for found in contests]
    pools = [Pool(torch.cat([p.score for p in c.values()]).unsqueeze(0), places, whole_batch=True) for c in joined]
    limits = shards.kth_largest(pools + extra)
    for found, limit in zip(joined, limits, strict=False):
        cut(found, found, limit, by_token=False)
    return {g: p for found in joined for g, p in found.items()}, limits[: len(pools)], limits[len(pools) :]


def _thin(found: dict[int, list[Picked]], least: float) -> None:
    """Drop what cannot win any more."""
    for g, parts in found.items():
        found[g] = [p.where(p.score >= least) for p in parts]


# ---------------------------------------------------------------- the cut


def cut(picked: dict[int, Picked], groups: Iterable[int], limit: Limit, by_token: bool) -> None:
    """Keep in each group what the limit of its contest allows; a row of the limit is a token, or the whole batch.

    Of entries equal to the limit the first ones stay, group after group."""
    value, left = limit.value.squeeze(1), limit.ties.squeeze(1).clone()
    for g in groups:
        p = picked[g]
        row = p.token if by_token else torch.zeros_like(p.entry)
        keep = p.score > value[row]
        tied = positions(p.score == value[row])
        if tied.numel():
            rows = row[tied]  # ascending, so that the rank within a row is the distance to its first
            rank = torch.arange(rows.numel(), device=rows.device) - torch.searchsorted(rows, rows)
            keep[tied] = rank < left[rows]
            left -= torch.bincount(rows, minlength=left.numel())
        picked[g] = p.where(keep)
