"""SAEBench's core metrics by its names and formulas (Karvonen et al. 2025, arXiv 2503.09532): eval_core.json.

With x [d] a site's raw activation, x̂ its reconstruction, E the mean over tokens, f the features, H a cross-entropy:

    kl_div_score       (KL_ablated - KL_sae) / KL_ablated             KL = KL(original ‖ changed), ablated = zero
    ce_loss_score      (H_ablated - H_sae) / (H_ablated - H_original)
    explained_variance         1 - E‖x - x̂‖² / (E‖x‖² - (E‖x‖² / d)²)
    explained_variance_legacy  E[1 - ‖x - x̂‖² / ‖x - x̄‖²]             x̄ = mean of the batch
    mse                E‖x - x̂‖²          cossim  E[x·x̂ / (‖x‖ ‖x̂‖)]
    l2_norm_in, _out   E‖x‖, E‖x̂‖         l2_ratio  E[‖x̂‖ / ‖x‖], ‖x‖ < 1e-4 counted as 1
    relative_reconstruction_bias  E‖x̂‖² / E[x·x̂]                      (per batch there; over all tokens here)
    l0, l1             E #{f ≠ 0}, E Σ f
    frac_alive, freq_over_p       share of features with density > 0, with density > p
    normalized_freq_over_p        those features' share of Σ density

Its explained_variance subtracts the square of a mean of squares where a variance has Σ_i (E x_i)²: it depends on the
scale of x and can exceed 1 (its older results hold the legacy formula under that name). It also divides mse by the
tokens of a batch, which we do not. `explained_variance` and `fvu` of eval.json are the usual ratio.

SAEBench measures one hook. Here each written site is one (features: those of the groups that write it), and
`eval_result_metrics` takes all written sites side by side as one hook, which for an SAE of one site is the same.
Tokens are those of the main evaluation: kept by the mask, held out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xlc_ray.dictionary import Dictionary, Features
from xlc_ray.evaluation.features import FeatureStatistics
from xlc_ray.evaluation.metrics import Moments

FILE = "eval_core.json"
SMALL = 1e-4


@dataclass
class CoreSums:
    """Sums over tokens of one hook that its Moments lack."""

    norm: float = 0.0
    """Σ ‖x‖."""
    norm_hat: float = 0.0
    """Σ ‖x̂‖."""
    ratio: float = 0.0
    """Σ ‖x̂‖ / ‖x‖."""
    legacy: float = 0.0
    """Σ 1 - ‖x - x̂‖² / ‖x - x̄‖²."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add a batch x, x_hat [B, d]."""
        x, x_hat = x.double(), x_hat.double()
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        spread = (x - x.mean(0)).square().sum(1)
        residual = (x - x_hat).square().sum(1)
        self.norm += norm.sum().item()
        self.norm_hat += norm_hat.sum().item()
        self.ratio += (norm_hat / norm.where(norm >= SMALL, 1)).sum().item()
        # A token that is its batch's mean, as the only one of a batch is, has no ratio: it counts as 1 if it is exact.
        unexplained = (residual / spread).where(spread > 0, (residual > 0).double())
        self.legacy += (1 - unexplained).sum().item()

    def merge(self, other: CoreSums) -> None:
        """Add the batches that another accumulator saw."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def compute(self, m: Moments) -> dict[str, dict[str, float | None]]:
        """The categories reconstruction_quality and shrinkage; `m`: of the same tokens."""
        n = max(m.count, 1)
        square = m.square / n
        spread = square - (square / len(m.total)) ** 2
        return {
            "reconstruction_quality": {
                "explained_variance": 1 - m.residual / n / spread if spread else None,
                "explained_variance_legacy": self.legacy / n,
                "mse": m.residual / n,
                "cossim": m.cosine / n,
            },
            "shrinkage": {
                "l2_norm_in": self.norm / n,
                "l2_norm_out": self.norm_hat / n,
                "l2_ratio": self.ratio / n,
                "relative_reconstruction_bias": m.predicted / m.dot if m.dot else None,
            },
        }


@dataclass
class CoreWatch:
    """The sums of every written site and of all side by side; sees the batches of evaluate_reconstruction, which has
    the moments of each site itself."""

    sites: dict[str, CoreSums]
    together: CoreSums
    moments: Moments
    """Of all side by side, in raw units."""

    @classmethod
    def empty(cls, widths: dict[str, int]) -> CoreWatch:
        """Before any batch; `widths`: written site → width."""
        return cls({site: CoreSums() for site in widths}, CoreSums(), Moments.empty(sum(widths.values())))

    def update(self, raw: dict[str, Tensor], raw_hat: dict[str, Tensor], features: list[Features]) -> None:
        """Add a batch, in raw units."""
        for site, sums in self.sites.items():
            sums.update(raw[site], raw_hat[site])
        x, x_hat = (torch.cat([values[site] for site in self.sites], dim=1) for values in (raw, raw_hat))
        self.together.update(x, x_hat)
        self.moments.update(x, x_hat)

    def merge(self, other: CoreWatch) -> None:
        """Add the batches that another accumulator saw."""
        for site, sums in self.sites.items():
            sums.merge(other.sites[site])
        self.together.merge(other.together)
        self.moments.merge(other.moments)


def core_metrics(
    dictionary: Dictionary,
    watch: CoreWatch,
    sites: dict[str, Moments],
    features: list[FeatureStatistics],
    replacement: dict[str, Any] | None,
) -> dict[str, Any]:
    """What stands in eval_core.json: eval_type_id, eval_result_metrics, and `sites` (site → the same categories).

    `sites`: the moments of each written site over the same tokens, in raw units. `replacement`: what
    evaluate_replacement returned; without it the categories of the model are left out."""
    writers = {s: [own for own, w in zip(features, dictionary.wiring.writes, strict=True) if s in w]
               for s in watch.sites}  # fmt: skip

    def categories(
        sums: CoreSums, moments: Moments, groups: list[FeatureStatistics], scores: dict[str, Any]
    ) -> dict[str, Any]:
        tokens = {"total_tokens_eval_reconstruction": replacement["tokens"]} if replacement else {}
        return {
            **(_model(scores, replacement["ce_original"]) if replacement else {}),
            **sums.compute(moments),
            **_activity(groups),
            "token_stats": {**tokens, "total_tokens_eval_sparsity_variance": moments.count},
        }

    one = replacement["sites"] if replacement else {}
    whole = replacement["all"] if replacement else {}
    return {
        "eval_type_id": "core",
        "eval_result_metrics": categories(watch.together, watch.moments, features, whole),
        "sites": {s: categories(sums, sites[s], writers[s], one.get(s, {})) for s, sums in watch.sites.items()},
    }


def _model(scores: dict[str, Any], original: float) -> dict[str, dict[str, float | None]]:
    ablated = scores["kl_ablated"]
    return {
        "model_behavior_preservation": {
            "kl_div_score": (ablated - scores["kl"]) / ablated if ablated else None,
            "kl_div_with_ablation": ablated,
            "kl_div_with_sae": scores["kl"],
        },
        "model_performance_preservation": {
            "ce_loss_score": scores["ce_recovered"],
            "ce_loss_with_ablation": scores["ce_ablated"],
            "ce_loss_with_sae": scores["ce_replaced"],
            "ce_loss_without_sae": original,
        },
    }


def _activity(groups: list[FeatureStatistics]) -> dict[str, dict[str, float | None]]:
    tokens = max(groups[0].tokens, 1)
    density = torch.cat([own.counts for own in groups]).double() / tokens
    total = float(density.sum())
    found: dict[str, float | None] = {"frac_alive": float((density > 0).double().mean())}
    for percent in (1, 10):
        often = density > percent / 100
        found[f"freq_over_{percent}_percent"] = float(often.double().mean())
        found[f"normalized_freq_over_{percent}_percent"] = float(density[often].sum()) / total if total else None
    return {
        "sparsity": {"l0": total, "l1": float(sum(own.total.sum() for own in groups)) / tokens},
        "misc_metrics": found,
    }
