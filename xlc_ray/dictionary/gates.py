"""Gates: pre-activations → sparse features, independent of what the features read and write.

A gate answers two questions about a group's pre-activations [B, F]:

    support(pre)        at which entries may f or its gradient differ from zero?   (no gradient flows here)
    activate(pre, g)    f there, elementwise, with the gate's own parameters       (with gradient)

so that f = activate(pre) on the support and 0 elsewhere, and dense and sparse products need no code of their own in a
gate. A gate owns its parameters (a list with one tensor [F] a group, split like the features), has a training and an
inference form (`module.training`), and offers the loss terms that only it can compute (`step`, `threshold`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xlc_ray.dictionary.shards import Limit, Pool, Shards

Groups = dict[int, Tensor]
"""Group number → one tensor."""
Masks = dict[int, Tensor]


class Gate(nn.Module):
    """The interface. `sizes`: features of each group on this rank."""

    needs_norms = False
    """Whether `support` compares activations times decoder norms."""

    def __init__(self, sizes: list[int], shards: Shards):
        super().__init__()
        self.sizes, self.shards = sizes, shards

    def pools(self, pre: Groups, norms: Groups) -> list[Pool]:
        """What this gate must rank over all ranks before it can select (training, or exact top-k)."""
        return []

    def support(self, pre: Groups, norms: Groups, limits: list[Limit]) -> Masks:
        """Entries to keep: a mask [B, F] for each group given. In inference form groups may be given singly."""
        raise TypeError(f"{type(self).__name__} has no support")

    def activate(self, pre: Tensor, g: int, feature: Tensor | None) -> Tensor:
        """f from pre: [B, F] (`feature` None) or [n] entries of the features named."""
        return pre

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

    def support(self, pre: Groups, norms: Groups, limits: list[Limit]) -> Masks:
        return {g: p > 0 for g, p in pre.items()}


class JumpReLU(Gate):
    """f = pre · 1[pre > θ], θ [F] learned by a straight-through gradient with the kernel K(u) = 1[|u| < ½], u = (pre - θ)/ε.

    `direct` (Rajamanoharan et al. 2024, arXiv 2407.14435): ∂f/∂θ = -(θ/ε) K, ∂f/∂pre = 1[pre > θ]; the step gives its
    gradient -(1/ε) K to θ alone. `log` (Anthropic, January 2025): θ = exp(t), and pre receives the kernel's gradient too:
    ∂f/∂pre = 1[pre > θ] + (θ/ε) K, ∂step/∂pre = K/ε.
    """

    def __init__(self, sizes: list[int], shards: Shards, threshold: float, bandwidth: float, log: bool):
        super().__init__(sizes, shards)
        start = torch.tensor(threshold).log().item() if log else threshold
        self.raw_threshold = nn.ParameterList([nn.Parameter(torch.full((n,), start)) for n in sizes])
        self.bandwidth, self.log = bandwidth, log

    def threshold(self, g: int) -> Tensor:
        return self.raw_threshold[g].exp() if self.log else self.raw_threshold[g]

    def support(self, pre: Groups, norms: Groups, limits: list[Limit]) -> Masks:
        margin = self.bandwidth / 2 if self.training else 0.0
        return {g: p > self.threshold(g).detach() - margin for g, p in pre.items()}

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

    def _scores(self, pre: Groups, norms: Groups) -> Groups:
        return {g: p * norms[g] for g, p in pre.items()} if self.needs_norms else pre

    def _contests(self, scores: Groups) -> list[Tensor]:
        """The values [rows, n] that compete with each other."""
        rivals = [torch.cat(list(scores.values()), dim=1)] if self.over_groups else list(scores.values())
        return [r.reshape(1, -1) for r in rivals] if self.over_batch else rivals

    def pools(self, pre: Groups, norms: Groups) -> list[Pool]:
        if self.shared and not self.training:
            return []
        tokens = next(iter(pre.values())).shape[0] * self.shards.replicas
        places = self.k * tokens if self.over_batch else self.k
        return [Pool(c, places, self.over_batch) for c in self._contests(self._scores(pre, norms))]

    def support(self, pre: Groups, norms: Groups, limits: list[Limit]) -> Masks:
        scores = self._scores(pre, norms)
        if self.shared and not self.training:
            theta = self.inference_threshold
            return {g: s > theta[0 if self.over_groups else g].to(s.dtype) for g, s in scores.items()}
        if self.shared:
            self.smallest_kept = torch.stack([_mean_of_finite(limit.value) for limit in limits])
        kept = [within(c, limit) for c, limit in zip(self._contests(scores), limits, strict=True)]
        if self.over_groups:
            tokens, sizes = next(iter(scores.values())).shape[0], [s.shape[1] for s in scores.values()]
            kept = list(kept[0].view(tokens, -1).split(sizes, dim=1))
        return {
            g: mask.view_as(scores[g]) if not self.over_groups else mask for g, mask in zip(scores, kept, strict=True)
        }

    def finish_step(self, step: int) -> None:
        """Move the inference threshold: to the last batch's before `start`, from then on as a running mean."""
        if not self.shared:
            return
        latest = self.smallest_kept
        if not self.over_batch:  # each replica saw other tokens
            self.shards.mean_over_replicas_(latest)
        decay = self.decay if step > self.start else 0.0
        self.inference_threshold.mul_(decay).add_(latest.to(self.inference_threshold.dtype), alpha=1 - decay)


def within(scores: Float[Tensor, "rows n"], limit: Limit) -> Bool[Tensor, "rows n"]:
    """Entries above the limit, and of those equal to it only as many as it allows, the first ones."""
    kept, equal = scores >= limit.value, scores == limit.value
    surplus = equal.sum(dim=1, keepdim=True) > limit.ties
    if surplus.any():
        rows = surplus.squeeze(1).nonzero().squeeze(1)
        late = equal[rows] & (equal[rows].cumsum(dim=1) > limit.ties[rows])
        kept[rows] &= ~late
    return kept


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
