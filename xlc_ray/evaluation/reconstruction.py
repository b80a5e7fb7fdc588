"""How well, and how sparsely, a dictionary reconstructs activations: one pass in inference form, no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.evaluation.metrics import ReconstructionMetrics

Watch = Callable[[list[Features], Tensor, Tensor], None]
"""Sees the features of a batch, its targets y and their reconstruction [B, W], both normalised."""


@torch.no_grad()
def evaluate_reconstruction(
    dictionary: Dictionary, batches: Iterable[dict[str, Tensor]], watch: Watch | None = None
) -> ReconstructionMetrics:
    """Accumulate the metrics of metrics.py over batches {site: [B, d]} in raw units; `watch` sees each batch too.

    The dictionary is measured in its inference form and left as it was found. Raises UserError where there is no row,
    or where a site or its reconstruction is not finite.
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
        metrics.update(batch, dictionary.denormalize(y_hat), y, y_hat, [f.count() for f in features])
        if watch:
            watch(features, y, y_hat)
    dictionary.train(was_training)
    _check(metrics)
    return metrics


def _check(metrics: ReconstructionMetrics) -> None:
    if not metrics.tokens:
        raise UserError("evaluate: the held-out activations hold no rows; set generate.held_out_tokens to more than 0")
    for site, moments in metrics.sites.items():
        if not math.isfinite(moments.square):
            raise UserError(f"evaluate: {site}: the held-out activations are not finite; try model.dtype: float32")
        if not math.isfinite(moments.residual):
            raise UserError(f"evaluate: {site}: the reconstruction is not finite; the dictionary diverged in training")
