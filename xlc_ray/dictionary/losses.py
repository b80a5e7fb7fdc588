"""Loss terms. Scale, unless said otherwise: sums over width, written sites and features, mean over tokens.

    reconstruction  (1/B) Σ_b Σ_s ‖y_bs - ŷ_bs‖²          (`per_dim`: each site's sum divided by its width)
    l1              (1/B) Σ f n          (Anthropic, April 2024; n = norm of the feature's decoder row, or 1)
    tanh            (1/B) Σ tanh(c f n)  (Anthropic, January 2025)
    l0              (1/B) Σ 1[pre > θ], or (L0/target - 1)²  (Rajamanoharan et al. 2024)
    preactivation   (1/B) Σ ReLU(θ - pre) n
    auxk            ‖e - ê‖² as reconstruction, e = y - ŷ detached, ê of dead features  (Gao et al. 2024)
    ghost           r ‖e - s ĝ‖² as reconstruction, ĝ of exp(pre) of dead features, s and r below (Anthropic, 2024)

A term over features is this rank's part: the parts of all ranks of a replica add up to the loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.gates import Gate
from xlc_ray.dictionary.shards import Shards

Norms = list[Tensor]


def site_weights(widths: list[int], per_dim: bool) -> Float[Tensor, "W"]:
    """Weight of each column of y: 1, or 1/width of its site."""
    return torch.cat([torch.full((w,), 1.0 / w if per_dim else 1.0) for w in widths])


def reconstruction(
    y_hat: Float[Tensor, "B W"], y: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None
) -> Float[Tensor, ""]:
    """(1/B) Σ_b Σ_w weight_w (y - ŷ)²; `weights` None = all ones."""
    return by_token(y_hat, y, weights).sum() / y.shape[0]


def by_token(
    y_hat: Float[Tensor, "B W"], y: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None
) -> Float[Tensor, "B"]:
    """Σ_w weight_w (y - ŷ)² of each token."""
    square = (y_hat - y).square()
    return (square if weights is None else square * weights).sum(dim=1)


def l1(features: list[Features], norms: Norms | None) -> Float[Tensor, ""]:
    """(1/B) Σ f n, over this rank's features."""
    if norms is None:
        terms = [f.total(lambda v, _: v) for f in features]
    else:
        terms = [f.total(lambda v, _, n: v * n, n) for f, n in zip(features, norms, strict=True)]
    return torch.stack(terms).sum() / features[0].shape[0]


def tanh(features: list[Features], norms: Norms | None, c: float) -> Float[Tensor, ""]:
    """(1/B) Σ tanh(c f n), over this rank's features."""
    if norms is None:
        terms = [f.total(lambda v, _: torch.tanh(c * v)) for f in features]
    else:
        terms = [f.total(lambda v, _, n: torch.tanh(c * v * n), n) for f, n in zip(features, norms, strict=True)]
    return torch.stack(terms).sum() / features[0].shape[0]


def l0(features: list[Features], gate: Gate) -> Float[Tensor, ""]:
    """(1/B) Σ 1[pre > θ] with the gate's straight-through gradient, over this rank's features."""
    terms = [gate.step(f.pre, g, f.support.feature if f.support else None).sum() for g, f in enumerate(features)]
    return torch.stack(terms).sum() / features[0].shape[0]


def l0_to_target(features: list[Features], gate: Gate, target: float, shards: Shards) -> Float[Tensor, ""]:
    """(L0/target - 1)², L0 over all features and the whole batch. Equal on all ranks: the whole term, not a part."""
    return (shards.mean_of_batches(l0(features, gate)) / target - 1).square()


def preactivation(pre: list[Tensor], gate: Gate, norms: Norms) -> Float[Tensor, ""]:
    """(1/B) Σ ReLU(θ - pre) n over all entries, also silent ones, of this rank."""
    terms = [(torch.relu(gate.threshold(g) - p) * n).sum() for g, (p, n) in enumerate(zip(pre, norms, strict=True))]
    return torch.stack(terms).sum() / pre[0].shape[0]


def auxk(
    error_hat: Float[Tensor, "B W"], error: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None
) -> Float[Tensor, ""]:
    """‖e - ê‖² at the scale of `reconstruction`; e is detached here, ê is without bias and already scaled."""
    return reconstruction(error_hat, error.detach(), weights)


def ghost(
    ghost_hat: Float[Tensor, "B W"], error: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None
) -> Float[Tensor, ""]:
    """(1/B) Σ_b r_b ‖e_b - s_b ĝ_b‖², with s_b = ‖e_b‖ / (2 ‖ĝ_b‖) and r_b = ‖e_b‖² / ‖e_b - s_b ĝ_b‖² held constant.

    ĝ = Σ exp(pre) W_dec over dead features, without bias. The value is that of `reconstruction`; only its gradient says
    something. (Ghost gradients, Anthropic's circuits updates of January 2024. Both factors are a token's own here, so
    that neither micro-batches nor replicas change them.)"""
    e, tiny = error.detach(), torch.finfo(error.dtype).tiny
    with torch.no_grad():
        lengths = [torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (e, ghost_hat)]
        scale = lengths[0] / (2 * lengths[1]).clamp(min=tiny)
    own = by_token(scale * ghost_hat, e, weights)
    return (by_token(torch.zeros_like(e), e, weights) / own.detach().clamp(min=tiny) * own).sum() / e.shape[0]
