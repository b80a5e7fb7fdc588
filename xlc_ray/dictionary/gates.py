"""Gates: pre-activations → sparse features, independent of what the features read and write.

A gate answers two questions about a group's pre-activations [B, F]:

    select(tiles)       at which entries may f or its gradient differ from zero?   (no gradient flows here)
    activate(pre, g)    f there, elementwise, with the gate's own parameters       (with gradient)

so that f = activate(pre) on those entries and 0 elsewhere, and dense and sparse products need no code of their own in a
gate. A gate owns its parameters (lists of a tensor a group, whose first dimension is the features and is split like
them), has a training and an inference form (`module.training`), and offers the loss terms that only it can compute
(`penalised`, `count`, `threshold`, `auxiliary_values`). gated.py and hard_concrete.py hold more gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from xlc_ray.config import UserError
from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.selection import LEAST, Picked, Tile, Tiles, above, best_of_batch, best_of_tokens
from xlc_ray.dictionary.shards import Limit, Pool, Shards
from xlc_ray.dictionary.sparse import Support
from xlc_ray.dictionary.zscore import ZScores, mean_so_far

Norms = Sequence[Tensor] | Mapping[int, Tensor] | None
"""Decoder norms [F] by group, at least of the groups that tiles show."""
Selected = tuple[dict[int, Picked | None], list[Limit]]
"""Entries of each group (None: too many to list, every entry counts), and the limits of the extra pools."""


class Gate(nn.Module, ABC):
    """The interface. `sizes`: features of each group on this rank."""

    ranks = False
    """Whether entries are selected by rank, not by a threshold of their own; they are kept as they are (f = pre)."""
    needs_norms = False
    """Whether `select` compares activations times decoder norms."""
    counts_all = False
    """Whether `count` reads all pre-activations, not only the selected ones."""
    auxiliary = 0.0
    """Weight of the reconstruction error of `auxiliary_values` under the frozen decoder; 0: there is no such term."""

    def __init__(self, sizes: list[int], shards: Shards):
        super().__init__()
        self.sizes, self.shards = sizes, shards

    def initialise(self, seed: int, first: list[int], encoders: list[tuple[Tensor, Tensor]]) -> None:
        """Called once when encoders (W_enc [F, R], b_enc [F]) have their start. `first`: this rank's first feature of
        each group. What is random must depend on the seed and a feature's number alone, not on the ranks."""

    def start_step(self, step: int, steps: int) -> None:
        """Called before each optimizer step, counted from 0."""

    def start_pass(self) -> None:
        """Called before each encoding in training form: once a step, or once a micro-batch."""

    def lower(self, g: int) -> Tensor | float:
        """What pre must exceed to be selected: [F] or a number. Gates that rank entries override `select` instead."""
        raise TypeError(f"{type(self).__name__} has no lower bound")

    def select(self, tiles: Tiles, norms: Norms, most: float, extra: list[Pool]) -> Selected:
        """Entries of the groups that `tiles` shows (in inference form they may be shown singly).

        A gate by threshold gives None for a group with more than the share `most` of its entries. `extra` pools travel
        in the same collective, if there is one."""
        return above(tiles, self.lower, most), self.shards.kth_largest(extra) if extra else []

    @abstractmethod
    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """f from pre: all [B, F] (`support` None), or the [n] entries of a support."""

    def magnitude(self, g: int) -> tuple[Tensor, Tensor] | None:
        """W [F, R], b [F] of a second encoder, if f = activate(pre) · (x Wᵀ + b); split like the features."""
        return None

    def step(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """1[f > 0] with the gate's straight-through gradient, where it has one."""
        raise UserError(f"train.loss.sparsity.kind: l0 has no gradient with the gate {type(self).__name__}")

    def penalised(self, values: Tensor, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """What l1, tanh and lp are taken of, at the entries of `activate`; zero where no entry is selected."""
        return values

    def count(self, features: list[Features], pre: list[Tensor] | None) -> Tensor:
        """Active features a token with gradient, over this rank's features. `pre`: all of them, with `counts_all`."""
        steps = [self.step(f.pre, g, f.support).sum() for g, f in enumerate(features)]
        return torch.stack(steps).sum() / features[0].shape[0]

    def auxiliary_values(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        """A second code at the entries of `activate`, for the auxiliary loss."""
        raise TypeError(f"{type(self).__name__} has no auxiliary loss")

    def threshold(self, g: int) -> Tensor | float:
        """What pre must exceed, for the pre-activation loss: a number or [F]."""
        return 0.0

    def finish_step(self, step: int) -> None:
        """Called after each optimizer step, counted from 1."""


class ReLU(Gate):
    """f = max(pre, 0)."""

    def lower(self, g: int) -> float:
        return 0.0

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        return torch.relu(pre)


class JumpReLU(Gate):
    """f = pre · 1[pre > θ], θ [F] learned by a straight-through gradient: kernel K(u) = 1[|u| < ½], u = (pre - θ)/ε.

    `direct` (Rajamanoharan et al. 2024, arXiv 2407.14435): ∂f/∂θ = -(θ/ε) K, ∂f/∂pre = 1[pre > θ]; the step gives its
    gradient -(1/ε) K to θ alone. `log` (Anthropic, January 2025): θ = exp(t), and pre receives the kernel's gradient:
    ∂f/∂pre = 1[pre > θ] + (θ/ε) K, ∂step/∂pre = K/ε. `crosslayer` (crosslayer-coding, which takes ε = 1): θ = exp(t),
    otherwise as `direct` but with pre for θ in the numerator, ∂f/∂θ = -(pre/ε) K.
    """

    raw_threshold: Sequence[nn.Parameter]

    def __init__(self, sizes: list[int], shards: Shards, threshold: float, bandwidth: float, kind: str):
        super().__init__(sizes, shards)
        self.bandwidth, self.log = bandwidth, kind != "direct"
        self.to_pre, self.by_value = kind == "log", kind == "crosslayer"
        start = torch.tensor(threshold).log().item() if self.log else threshold
        thresholds = nn.ParameterList([nn.Parameter(torch.full((n,), start)) for n in sizes])
        self.raw_threshold = thresholds  # pyrefly: ignore (a sequence of just these)

    def threshold(self, g: int) -> Tensor:
        return self.raw_threshold[g].exp() if self.log else self.raw_threshold[g]

    def lower(self, g: int) -> Tensor:
        return self.threshold(g).detach() - (self.bandwidth / 2 if self.training else 0.0)

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        theta = at(self.threshold(g), support)
        return _Jump.apply(pre, theta, self.bandwidth, self.to_pre, self.by_value)

    def step(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        theta = at(self.threshold(g), support)
        return _Step.apply(pre, theta, self.bandwidth, self.to_pre)

    @torch.no_grad()
    def finish_step(self, step: int) -> None:
        """Hold θ ≥ 0, without which features could be negative."""
        if not self.log:
            for theta in self.raw_threshold:
                theta.clamp_(min=0)


class TopK(Gate):
    """The k largest activations max(pre, 0): of each token (Gao et al. 2024), or of the batch (Bussmann et al. 2024).

    `over_batch`: k·B places are shared by all B tokens of the global batch (all replicas). `over_groups`: the groups
    share one budget of k (else each has its own). Entries compete by their activation; by activation × decoder norm
    (`by_norm`); or by their z-score over the tokens of the batch (`by_zscore`, as crosslayer-coding does), and
    then what is kept is pre itself, which may be negative.

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
        by_zscore: bool,
        start: int,
        decay: float,
    ):
        super().__init__(sizes, shards)
        self.zscores = ZScores(sizes, shards) if by_zscore else None
        self.k, self.over_batch, self.over_groups, self.needs_norms = k, over_batch, over_groups, by_norm
        self.start, self.decay = start, decay
        self.shared = over_batch or over_groups
        pools = 1 if over_groups else len(sizes)
        self.register_buffer("inference_threshold", torch.zeros(pools))
        self.register_buffer("smallest_kept", torch.zeros(pools))
        self._parts = 0  # of this step's batch, so far

    def select(self, tiles: Tiles, norms: Norms, most: float, extra: list[Pool]) -> Selected:
        if self.zscores and self.training:
            self.zscores.observe(tiles)

        def score(tile: Tile) -> Tensor:
            if self.zscores:
                return self.zscores.of(tile.pre, tile.g)
            return tile.pre * norms[tile.g] if norms is not None and self.needs_norms else tile.pre

        if self.shared and not self.training:
            return self._above_threshold(tiles, norms), self.shards.kth_largest(extra) if extra else []
        if self.over_batch:
            places = self.k * next(tiles(False)).tokens * self.shards.replicas
            found, limits, others = best_of_batch(tiles, places, score, self.over_groups, self.shards, extra)
        else:
            found, limits, others = best_of_tokens(tiles, self.k, score, self.over_groups, self.shards, extra)
        if self.shared:
            kept = torch.stack([_mean_of_finite(limit.value) for limit in limits])
            self.smallest_kept = mean_so_far(self.smallest_kept, self._parts, kept)
            self._parts += 1
        return dict(found), others

    def _above_threshold(self, tiles: Tiles, norms: Norms) -> dict[int, Picked | None]:
        def lower(g: int) -> Tensor:
            theta = self.inference_threshold[0 if self.over_groups else g]
            if self.zscores:
                return self.zscores.undo(theta, g)
            return theta / norms[g].clamp(min=LEAST) if norms is not None and self.needs_norms else theta

        return above(tiles, lower, most=1.0)

    def activate(self, pre: Tensor, g: int, support: Support | None) -> Tensor:
        return pre

    def finish_step(self, step: int) -> None:
        """Move the inference threshold: to the last batch's (the mean over its micro-batches) before `start`, from then
        on as a running mean."""
        self._parts = 0
        decay = self.decay if step > self.start else 0.0
        if self.zscores:
            self.zscores.move(decay)
        if not self.shared:
            return
        latest = self.smallest_kept
        if not self.over_batch:  # each replica saw other tokens
            self.shards.mean_over_replicas_(latest)
        self.inference_threshold.mul_(decay).add_(latest.to(self.inference_threshold.dtype), alpha=1 - decay)


def at(per_feature: Tensor, support: Support | None) -> Tensor:
    """Values [F] of features, as they meet pre-activations: as they are, or [n] at the entries of a support."""
    return per_feature if support is None else per_feature[support.feature]


def _mean_of_finite(values: Tensor) -> Tensor:
    """Mean of the finite values, 0 where there is none."""
    finite = torch.isfinite(values)
    return values.where(finite, 0).sum() / finite.sum().clamp(min=1)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, theta, bandwidth, to_pre, by_value):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth, ctx.to_pre, ctx.by_value = bandwidth, to_pre, by_value
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        kernel = ((pre if ctx.by_value else theta) / ctx.bandwidth) * _kernel(pre, theta, ctx.bandwidth)
        d_pre = grad * ((pre > theta) + kernel) if ctx.to_pre else grad * (pre > theta)
        return d_pre, (-grad * kernel).sum_to_size(theta.shape), None, None, None


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
