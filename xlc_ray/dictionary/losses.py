"""Loss terms. Scale, unless said otherwise: sums over width, written sites and features, mean over tokens.

    reconstruction  (1/B) Σ_b Σ_s ‖y_bs - ŷ_bs‖²          (`per_dim`: each site's sum divided by its width)
    l1              (1/B) Σ f n          (Anthropic, April 2024; n = norm of the feature's decoder row, or 1)
    tanh            (1/B) Σ tanh(c f n)  (Anthropic, January 2025)
    lp              (1/B) Σ (f n)^p, p falling from 1        (Karvonen et al. 2024)
    l0              L0 = (1/B) Σ 1[pre > θ], or its expectation (hard concrete); or (L0/target - 1)²
                    (Rajamanoharan et al. 2024)
    preactivation   (1/B) Σ ReLU(θ - pre) n
    auxk            ‖e - ê‖² as reconstruction, e = y - ŷ detached, ê of dead features  (Gao et al. 2024)
    ghost           r ‖e - s ĝ‖² as reconstruction, ĝ of exp(pre) of dead features, s and r below (Anthropic, 2024)

The last two are of one dictionary: where a wiring falls into parts (`Wiring.parts`), each has its own.
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
FLOOR = 1e-6
"""ε of `lp`, in units of f n."""


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


def of_prefixes(
    y_hats: list[Float[Tensor, "B W"]], y: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None, mean: bool
) -> Float[Tensor, ""]:
    """Matryoshka (Bussmann et al. 2025): mean or sum of the reconstruction errors of nested dictionaries."""
    errors = torch.stack([reconstruction(y_hat, y, weights) for y_hat in y_hats])
    return errors.mean() if mean else errors.sum()


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


def lp(features: list[Features], norms: Norms | None, p: float, shards: Shards | None) -> Float[Tensor, ""]:
    """(1/B) Σ ((f n + ε)^p - ε^p), over this rank's features; ε bounds the slope at 0, and p = 1 is l1.

    With `shards` it is multiplied by what makes it as large as l1 on this batch (a number without gradient, equal on
    all ranks), so that the strength of the penalty does not change with p."""
    floor = FLOOR**p

    def term(v: Tensor, _: Tensor, *n: Tensor) -> Tensor:
        return ((v * n[0] if n else v) + FLOOR) ** p - floor

    weights = [(n,) for n in norms] if norms is not None else [()] * len(features)
    terms = [f.total(term, *w) for f, w in zip(features, weights, strict=True)]
    penalty = torch.stack(terms).sum() / features[0].shape[0]
    if shards is None:
        return penalty
    with torch.no_grad():
        plain, powered = shards.mean_of_batches(torch.stack([l1(features, norms), penalty.detach()]))
        return_to_scale = torch.where(powered > 0, plain / powered, 1.0)
    return penalty * return_to_scale


def exponent(end: float, hold: float, step: int, steps: int) -> float:
    """p at a step (from 0): 1 for the share `hold` of the run, then linearly to `end` at the last step."""
    held = round(hold * steps)
    return 1 - (1 - end) * max(0, step - held) / max(1, steps - 1 - held)


def l0(features: list[Features], gate: Gate, pre: list[Tensor] | None = None) -> Float[Tensor, ""]:
    """Active features a token with the gate's gradient, over this rank's features. `pre`: where the gate needs all."""
    return gate.count(features, pre)


def l0_to_target(
    features: list[Features], gate: Gate, target: float, shards: Shards, pre: list[Tensor] | None = None
) -> Float[Tensor, ""]:
    """(L0/target - 1)², L0 over all features and all replicas. Equal on all ranks: the whole term, not a part."""
    return (shards.mean_of_batches(l0(features, gate, pre)) / target - 1).square()


def preactivation(pre: list[Tensor], gate: Gate, norms: Norms) -> Float[Tensor, ""]:
    """(1/B) Σ ReLU(θ - pre) n over all entries, also silent ones, of this rank."""
    terms = [(torch.relu(gate.threshold(g) - p) * n).sum() for g, (p, n) in enumerate(zip(pre, norms, strict=True))]
    return torch.stack(terms).sum() / pre[0].shape[0]


def auxk(
    error_hat: Float[Tensor, "B W"], error: Float[Tensor, "B W"], weights: Float[Tensor, "W"] | None
) -> Float[Tensor, ""]:
    """‖e - ê‖² at the scale of `reconstruction`; e is detached here, ê is without bias; the caller scales
    the loss by min(1, dead/k)."""
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
        scale = lengths[0] / (2 * lengths[1]).clamp(min=tiny**0.5)  # ĝ may vanish; s² stays finite
    own = by_token(scale * ghost_hat, e, weights)
    return (by_token(torch.zeros_like(e), e, weights) / own.detach().clamp(min=tiny) * own).sum() / e.shape[0]
