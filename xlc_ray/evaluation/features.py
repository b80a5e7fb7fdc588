"""What each feature does on the tokens evaluated: features.parquet, a row a feature.

    density           share of tokens with f ≠ 0              dead             no such token
    max_activation    max f                                   mean_activation  mean f over those tokens
    decoder_norm      ‖W_dec_i‖ over all written sites, in the dictionary's units
    site              the written site that has the greatest share of ‖W_dec_i‖² (site_index: its place among all)
    site_share        that share
    cosine_to_mean    cosine of the decoder row at that site with the site's mean activation, both in raw units: near ±1
                      a feature stands for the mean direction, as a bias would

Columns without a value (the activations of a dead feature, the site of a zero row) are null. Activations are in the
dictionary's units. Counts are exact, sums float64; accumulators merge over workers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.dictionary.fold import expanded_decoder
from xlc_ray.evaluation.metrics import Moments

FILE = "features.parquet"


@dataclass
class FeatureStatistics:
    """Activations of one group's F features."""

    tokens: int
    counts: Tensor
    """Active tokens of each feature [F] int64."""
    total: Tensor
    """Σ f [F] float64."""
    largest: Tensor
    """max f over active tokens [F] float64, -inf where there is none."""

    @classmethod
    def empty(cls, features: int) -> FeatureStatistics:
        """Before any batch, of a group of so many features."""
        zeros = torch.zeros(features, dtype=torch.float64)
        return cls(0, zeros.long(), zeros, torch.full_like(zeros, -torch.inf))

    def update(self, features: Features) -> None:
        """Add a batch."""
        tokens, size = features.shape
        _, feature, value = features.entries()
        value = value.detach().double()
        self.tokens += tokens
        self.counts = self.counts + torch.bincount(feature, minlength=size).cpu()
        self.total = self.total + value.new_zeros(size).index_add(0, feature, value).cpu()
        largest = value.new_full((size,), -torch.inf).scatter_reduce(0, feature, value, "amax")
        self.largest = torch.maximum(self.largest, largest.cpu())

    def merge(self, other: FeatureStatistics) -> None:
        """Add the tokens that another accumulator saw."""
        self.tokens += other.tokens
        self.counts = self.counts + other.counts
        self.total = self.total + other.total
        self.largest = torch.maximum(self.largest, other.largest)


@dataclass
class FeatureWatch:
    """The statistics of all groups; sees the batches of evaluate_reconstruction."""

    groups: list[FeatureStatistics]

    @classmethod
    def empty(cls, features: list[int]) -> FeatureWatch:
        """Before any batch, of groups of so many features each."""
        return cls([FeatureStatistics.empty(n) for n in features])

    def update(self, raw: dict[str, Tensor], raw_hat: dict[str, Tensor], features: list[Features]) -> None:
        """Add a batch."""
        for group, own in zip(self.groups, features, strict=True):
            group.update(own)

    def merge(self, other: FeatureWatch) -> None:
        """Add the tokens that another accumulator saw."""
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            mine.merge(theirs)


def feature_table(dictionary: Dictionary, watch: FeatureWatch, sites: dict[str, Moments]) -> pa.Table:
    """The table of features.parquet. `sites`: the moments of each written site over the same tokens."""
    means = {site: moments.total / max(moments.count, 1) for site, moments in sites.items()}
    parts = [_rows(dictionary, g, own, means) for g, own in enumerate(watch.groups)]
    return pa.concat_tables(parts)


def write_features(run_dir: str, table: pa.Table) -> str:
    """Write features.parquet into a run directory (or URL) and return its path."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    path = files.join(run_dir, FILE)
    files.write_bytes(path, sink.getvalue())
    return path


@torch.no_grad()
def _rows(dictionary: Dictionary, g: int, own: FeatureStatistics, means: dict[str, Tensor]) -> pa.Table:
    wiring, rows = dictionary.wiring, expanded_decoder(dictionary, g).double().cpu()
    square, best, cosine = _directions(dictionary, g, rows, means)
    alive, written = own.counts > 0, square.sum(1) > 0
    order = {site: n for n, site in enumerate(wiring.written_sites)}
    names = np.array(wiring.writes[g])[best.numpy()]
    features = len(own.counts)
    columns: dict[str, Any] = {
        "group": np.full(features, g, np.int32),
        "feature": np.arange(features, dtype=np.int32),
        "density": own.counts.double() / max(own.tokens, 1),
        "max_activation": _nullable(own.largest, alive),
        "mean_activation": _nullable(own.total / own.counts.clamp(min=1), alive),
        "decoder_norm": square.sum(1).sqrt(),
        "site": pa.array(names, mask=(~written).numpy()).dictionary_encode(),
        "site_index": pa.array(np.array([order[n] for n in names], np.int32), mask=(~written).numpy()),
        "site_share": _nullable(square.amax(1) / square.sum(1).clamp(min=1e-300), written),
        "cosine_to_mean": _nullable(cosine, cosine.isfinite()),
        "dead": ~alive,
    }
    return pa.table({k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}).unify_dictionaries()


def _directions(
    dictionary: Dictionary, g: int, rows: Tensor, means: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """‖W_dec_i‖² at each written site [F, sites], the greatest's number [F], and its raw cosine to the mean [F]."""
    wiring = dictionary.wiring
    own, all_sites = wiring.columns(wiring.writes[g]), wiring.columns(wiring.written_sites)
    square, cosines = [], []
    for site in wiring.writes[g]:
        part = rows[:, own[site]]
        raw = part * dictionary.write_scale[all_sites[site]].double().cpu()
        square.append(part.square().sum(1))
        cosines.append(raw @ means[site] / (raw.norm(dim=1) * means[site].norm()))
    best = torch.stack(square, 1).argmax(1)
    return torch.stack(square, 1), best, torch.stack(cosines, 1).gather(1, best[:, None])[:, 0]


def _nullable(values: Tensor, known: Tensor) -> pa.Array:
    return pa.array(values.numpy(), mask=(~known).numpy())
