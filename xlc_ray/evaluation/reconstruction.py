"""How well, and how sparsely, a dictionary reconstructs activations: one pass in inference form, no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.evaluation.metrics import ReconstructionMetrics
from xlc_ray.evaluation.model_diff import ModelDiff


class Watch(Protocol):
    """Whatever else is accumulated in the same pass."""

    def update(self, raw: dict[str, Tensor], raw_hat: dict[str, Tensor], features: list[Features]) -> None:
        """Add a batch: site → [B, d] in raw units, reconstructions of the written ones, features of each group."""


@torch.no_grad()
def evaluate_reconstruction(
    dictionary: Dictionary,
    batches: Iterable[dict[str, Tensor]],
    watches: Sequence[Watch] = (),
    diff: ModelDiff | None = None,
) -> ReconstructionMetrics:
    """Accumulate the metrics of metrics.py over batches {site: [B, d]} in raw units; `watches` see every batch too, and
    `diff` what is normalised.

    The dictionary is measured in its inference form and left as it was found. Of one that is split over ranks, all
    ranks of a replica call this with the same batches and get the metrics of the whole; `watches` and `diff` need one
    rank.
    """
    wiring, device, was_training = dictionary.wiring, dictionary.b_dec.device, dictionary.training
    widths = {site: wiring.widths[site] for site in wiring.written_sites}
    metrics = ReconstructionMetrics.empty(widths, list(dictionary.sizes))
    dictionary.eval()
    for batch in batches:
        batch = {site: batch[site].to(device) for site in wiring.sites}
        x, y = dictionary.normalize_inputs(batch), dictionary.normalize_targets(batch)
        features = dictionary.encode(x)
        y_hat = dictionary.decode(features, x)
        raw_hat = dictionary.denormalize(y_hat)
        metrics.update(batch, raw_hat, y, y_hat, _counts(dictionary, features))
        for watch in watches:
            watch.update(batch, raw_hat, features)
        if diff:
            diff.update(features, y, y_hat)
    dictionary.train(was_training)
    return metrics


def _counts(dictionary: Dictionary, features: list[Features]) -> list[Tensor]:
    """Active tokens of each feature, those of other ranks included, for each group [F]."""
    shards = dictionary.shards
    if shards.group is None:
        return [f.count() for f in features]
    whole = [torch.zeros(size, dtype=torch.int64, device=dictionary.b_dec.device) for size in dictionary.sizes]
    for counts, f in zip(whole, features, strict=True):
        counts[slice(*shards.bounds(len(counts)))] = f.count()
    return list(shards.total(torch.cat(whole)).split([len(counts) for counts in whole]))
