"""Gates: pre-activations → sparse features, independent of what the features read and write.

A gate answers two questions about a group's pre-activations [B, F]:

    select(tiles)       at which entries may f or its gradient differ from zero?   (no gradient flows here)
    activate(pre, g)    f there, elementwise, with the gate's own parameters       (with gradient)

so that f = activate(pre) on those entries and 0 elsewhere, and dense and sparse products need no code of their own in a
gate. A gate owns its parameters (a list with one tensor [F] a group, split like the features), has a training and an
inference form (`module.training`), and offers the loss terms that only it can compute (`step`, `threshold`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xlc_ray.dictionary.selection import LEAST, Picked, Tile, Tiles, above, best_of_batch, best_of_tokens
from xlc_ray.dictionary.shards import Limit, Pool, Shards

Norms = list[Tensor] | None
Selected = tuple[dict[int, Picked | None], list[Limit]]
"""Entries of each group (None: too many to list, every entry counts), and the limits of the extra pools."""


class Gate(nn.Module):
    """The interface. `sizes`: features of each group on this rank."""

    ranks = False
    """Whether entries are selected by rank, not by a threshold of their own; they are kept as they are (f = pre)."""
    needs_norms = False
    """Whether `select` compares activations times decoder norms."""

    def __init__(self, sizes: list[int], shards: Shards):
        super().__init__()
        self.sizes, self.shards = sizes, shards

    def lower(self, g: int) -> Tensor | float:
        """What pre must exceed to be selected: [F] or a number. Gates that rank entries override `select` instead."""
        raise TypeError(f"{type(self).__name__} has no lower bound")

    def select(self, tiles: Tiles, norms: Norms, most: float, extra: list[Pool]) -> Selected:
        """Entries of the groups that `tiles` shows (in inference form they may be shown singly).

        A gate by threshold gives None for a group with more than the share `most` of its entries. `extra` pools travel
        in the same collective, if there is one."""
        return above(tiles, self.lower, most), self.shards.kth_largest(extra) if extra else []

    def activate(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        """f from pre: all [B, F] (`feature` None), or [n] selected entries of the features named."""
        raise TypeError(f"{type(self).__name__} has no activation")

    def step(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        """1[f > 0] with the gate's straight-through gradient, where it has one."""
        raise TypeError(f"{type(self).__name__} has no differentiable step")

    def threshold(self, g: int) -> Tensor | float:
        """What pre must exceed, for the pre-activation loss: a number or [F]."""
        return 0.0

    def finish_step(self, step: int) -> None:
        """Called after each optimizer step, counted from 1."""


class ReLU(Gate):
    """f = max(pre, 0)."""

    def lower(self, g: int) -> float:
        return 0.0

    def activate(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        return torch.relu(pre)


class JumpReLU(Gate):
    """f = pre · 1[pre > θ], θ [F] learned by a straight-through gradient: kernel K(u) = 1[|u| < ½], u = (pre - θ)/ε.

    `direct` (Rajamanoharan et al. 2024, arXiv 2407.14435): ∂f/∂θ = -(θ/ε) K, ∂f/∂pre = 1[pre > θ]; the step gives its
    gradient -(1/ε) K to θ alone. `log` (Anthropic, January 2025): θ = exp(t), and pre receives the kernel's gradient:
    ∂f/∂pre = 1[pre > θ] + (θ/ε) K, ∂step/∂pre = K/ε.
    """

    raw_threshold: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards, threshold: float, bandwidth: float, log: bool):
        super().__init__(sizes, shards)
        start = torch.tensor(threshold).log().item() if log else threshold
        thresholds = nn.ParameterList([nn.Parameter(torch.full((n,), start)) for n in sizes])
        self.raw_threshold = thresholds  # pyrefly: ignore (a sequence of just these)
        self.bandwidth, self.log = bandwidth, log

    def threshold(self, g: int) -> Tensor:
        return self.raw_threshold[g].exp() if self.log else self.raw_threshold[g]

    def lower(self, g: int) -> Tensor:
        return self.threshold(g).detach() - (self.bandwidth / 2 if self.training else 0.0)

    def activate(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        theta = self.threshold(g) if feature is None else self.threshold(g)[feature]
        return _Jump.apply(pre, theta, self.bandwidth, self.log)

    def step(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        theta = self.threshold(g) if feature is None else self.threshold(g)[feature]
        return _Step.apply(pre, theta, self.bandwidth, self.log)

    @torch.no_grad()
    def finish_step(self, step: int) -> None:
        """Hold θ ≥ 0, without which features could be negative."""
        if not self.log:
            for theta in self.raw_threshold:
                theta.clamp_(min=0)


class TopK(Gate):
    """The k largest activations max(pre, 0): of each token (Gao et al. 2024), or of the batch (Bussmann et al. 2024).

    `over_batch`: k·B places are shared by all B tokens of the global batch (all replicas). `over_groups`: the groups
    share one budget of k (else each has its own). `by_norm`: entries compete by activation × decoder norm.

    A place shared between tokens or groups cannot be given at inference, where a feature must depend on its own token
    and group alone: there f = pre · 1[score > θ], θ the running mean, from training step `start` on, of the smallest
    score that was kept. With a budget a token and group the k largest are taken at inference too.
    """

    ranks = True
    inference_threshold: Tensor
    smallest_kept: Tensor

    def __init__(
        self,
        sizes: list[int],
        shards: Shards,
        k: int,
        over_batch: bool,
        over_groups: bool,
        by_norm: bool,
        start: int,
        decay: float,
    ):
        super().__init__(sizes, shards)
        self.k, self.over_batch, self.over_groups, self.needs_norms = k, over_batch, over_groups, by_norm
        self.start, self.decay = start, decay
        self.shared = over_batch or over_groups
        pools = 1 if over_groups else len(sizes)
        self.register_buffer("inference_threshold", torch.zeros(pools))
        self.register_buffer("smallest_kept", torch.zeros(pools))

    def select(self, tiles: Tiles, norms: Norms, most: float, extra: list[Pool]) -> Selected:
        def score(tile: Tile) -> Tensor:
            return tile.pre * norms[tile.g] if norms is not None and self.needs_norms else tile.pre

        if self.shared and not self.training:
            return self._above_threshold(tiles, norms), self.shards.kth_largest(extra) if extra else []
        if self.over_batch:
            places = self.k * next(tiles(False)).tokens * self.shards.replicas
            found, limits, others = best_of_batch(tiles, places, score, self.over_groups, self.shards, extra)
        else:
            found, limits, others = best_of_tokens(tiles, self.k, score, self.over_groups, self.shards, extra)
        if self.shared:
            self.smallest_kept = torch.stack([_mean_of_finite(limit.value) for limit in limits])
        return dict(found), others

    def _above_threshold(self, tiles: Tiles, norms: Norms) -> dict[int, Picked | None]:
        def lower(g: int) -> Tensor:
            theta = self.inference_threshold[0 if self.over_groups else g]
            return theta / norms[g].clamp(min=LEAST) if norms is not None and self.needs_norms else theta

        return above(tiles, lower, most=1.0)

    def activate(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        return pre

    def finish_step(self, step: int) -> None:
        """Move the inference threshold: to the last batch's before `start`, from then on as a running mean."""
        if not self.shared:
            return
        latest = self.smallest_kept
        if not self.over_batch:  # each replica saw other tokens
            self.shards.mean_over_replicas_(latest)
        decay = self.decay if step > self.start else 0.0
        self.inference_threshold.mul_(decay).add_(latest.to(self.inference_threshold.dtype), alpha=1 - decay)


def _mean_of_finite(values: Tensor) -> Tensor:
    """Mean of the finite values, 0 where there is none."""
    finite = torch.isfinite(values)
    return values.where(finite, 0).sum() / finite.sum().clamp(min=1)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta, bandwidth, to_pre):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth, ctx.to_pre = bandwidth, to_pre
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        kernel = (theta / ctx.bandwidth) * _kernel(pre, theta, ctx.bandwidth)
        d_pre = grad * ((pre > theta) + kernel) if ctx.to_pre else grad * (pre > theta)
        return d_pre, (-grad * kernel).sum_to_size(theta.shape), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta, bandwidth, to_pre):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth, ctx.to_pre = bandwidth, to_pre
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        slope = grad * _kernel(pre, theta, ctx.bandwidth) / ctx.bandwidth
        return slope if ctx.to_pre else None, (-slope).sum_to_size(theta.shape), None, None


def _kernel(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    return ((pre - theta).abs() < bandwidth / 2).to(pre.dtype)
