"""What a store knows about itself: its sites, its chunks, the moments of its activations.

Moments are float64 and merge exactly enough to be taken in any order: with n = nₐ + n_b and δ = μ_b − μₐ,
μ = μₐ + δ n_b/n and M₂ = M₂ₐ + M₂_b + δ² nₐ n_b/n (Chan et al. 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

FORMAT_VERSION = 1
MEND = "remove this file and run what made the store, jobs/generate.py as a rule, again"
"""What helps against a chunk file that has its size and another content: what makes stores goes by sizes."""


class ChunkRecord(BaseModel):
    """One chunk file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    """The number in its file's name."""
    file: str
    rows: int
    bytes: int
    checksum: str | None
    """XXH3 (64 bits, hexadecimal) of the file; None in stores of other programs."""
    offsets: dict[str, int | None]
    """Where each site's array begins in the file; None where it is chunked or compressed."""
    sides: dict[str, int] = {}
    """Of int8 and bfloat16_zstd: where begins what unpacks it (compact.py, lossless.py). Of all else in a file: where
    it begins, by its name (shuffling.py)."""


@dataclass(frozen=True)
class Span:
    """Bytes start … stop-1 of a chunk file."""

    record: ChunkRecord
    start: int
    stop: int


Read = Callable[[Sequence[Span]], Iterable[np.ndarray | bytes]]
"""The bytes of each span."""


class Manifest(BaseModel):
    """A complete store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    sites: dict[str, int]
    """Width of each site."""
    dtype: str
    """float32, float16, bfloat16 (kept as uint16 bits), bfloat16_zstd (lossless.py), or int8 (compact.py)."""
    chunks: tuple[ChunkRecord, ...]
    tokens: int
    """Rows in all chunks."""
    model: str
    """Name of the language model."""
    fingerprint: str | None
    """Hash of `identity`; None in stores of other programs."""
    identity: dict[str, Any]
    """Every setting that decides the content: model, text, seed, …"""
    lost: dict[str, float] = {}
    """Of int8: the share of each site's variance that was lost (compact.py)."""

    @property
    def has_text(self) -> bool:
        """Whether the text of its rows is known: not in stores of other programs, nor in imported ones."""
        return "text" in self.identity


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site over all rows of a store, float64."""

    count: int
    mean: np.ndarray
    """[width]"""
    std: np.ndarray
    """Unbiased, [width]."""
    mean_norm: float | None
    """Mean of the rows' Euclidean norms; None where another program did not record it."""


@dataclass(frozen=True)
class Moments:
    """Running moments of rows [n, width]."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    norm_sum: float
    lost: float = 0.0
    """Squared distance of the rows from what they stand for."""

    @staticmethod
    def of(rows: np.ndarray) -> Moments:
        """Moments of float64 rows [n, width]."""
        mean = rows.mean(axis=0)
        centred = rows - mean
        return Moments(len(rows), mean, np.einsum("nd,nd->d", centred, centred), _norms(rows))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2, self.norm_sum + other.norm_sum, self.lost + other.lost)

    def statistics(self) -> SiteStatistics:
        """Mean, unbiased deviation, mean norm."""
        std = np.sqrt(self.m2 / max(self.count - 1, 1))
        return SiteStatistics(self.count, self.mean, std, self.norm_sum / self.count)


def _norms(rows: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows)).sum())
