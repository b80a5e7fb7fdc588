"""One optimizer step of one rank: the same for one process and for replicas × shards.

encode, decode (one all-reduce), losses, backward           for each micro-batch
mean of gradients over replicas                             one collective, with replicas only
global gradient norm and counts of dead features            one small sum, with shards only
clip, Adam, unit norm, thresholds, dead-feature counters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.encoding import DeadFeatures, Encoding
from xlc_ray.dictionary.recycling import forget_gradients
from xlc_ray.training import optimizers
from xlc_ray.training.objective import Objective, Terms
from xlc_ray.training.schedules import factor, rewarmed

Batch = Mapping[str, Tensor]
Micro = tuple[Batch, "Callable[[Tensor], Terms] | None"]
"""A micro-batch, and what the reconstruction ŷ [B, W] of it adds to the loss (None: nothing)."""


PIECE = 4096
"""Numbers whose squares are added up in their own precision; with 768 a norm took twice as long."""


class Diverged(UserError):
    """The gradient is not finite: training cannot go on with these settings or activations."""


class Learner:
    """A dictionary with its optimizer, dead-feature counters and step number."""

    def __init__(self, dictionary: Dictionary, config: Config):
        self.dictionary, self.config, self.shards = dictionary, config, dictionary.shards
        train = config.train
        if train.precision == "float64":
            dictionary.double()
        dictionary.matmul_dtype = torch.bfloat16 if train.precision == "bfloat16" else None
        self.device = dictionary.b_dec.device
        self.parameters = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
        self.optimizer = optimizers.make(train, self.parameters.values())
        self.shrink: float | None = None
        self.silent = [torch.zeros_like(g.b_enc, dtype=torch.int64) for g in dictionary.groups]
        self.dead_totals = [0] * len(self.silent)
        self.step = 0
        self.objective = Objective(dictionary, config)

    # ------------------------------------------------------------ a step

    def train_step(self, batch: Batch, measure: bool) -> dict[str, float] | None:
        """Train on this replica's share of a batch (site → [rows, d]), micro-batch after micro-batch; metrics where
        `measure`. Raises Diverged."""
        parts, rows = self.config.train.accumulate, next(iter(batch.values())).shape[0]
        cuts = [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
        micros = (({site: values[cut] for site, values in batch.items()}, None) for cut in cuts)
        return self.train_on(micros, rows, measure)

    def train_on(self, micros: Iterable[Micro], rows: int, measure: bool) -> dict[str, float] | None:
        """Likewise on `accumulate` micro-batches, of so many rows together."""
        self.dictionary.train()
        self.dictionary.gate.start_step(self.step, self.config.train.steps)
        forget_gradients(self.parameters.values())
        fired = [torch.zeros_like(s, dtype=torch.bool) for s in self.silent]
        metrics: dict[str, Tensor] = {}
        for micro, more in micros:
            metrics = self._micro_step(micro, more, fired, measure, metrics)
        if of_weights := self.objective.of_weights():
            torch.stack([weight * term for weight, term, _ in of_weights.values()]).sum().backward()
            metrics |= _named(of_weights) if measure else {}
        self._mean_over_replicas(fired)
        self._count_silence(fired, rows * self.shards.replicas)
        norm = self._finish_gradients()
        if not math.isfinite(norm):
            raise Diverged(
                f"step {self.step + 1}: the gradient norm is {norm}; lower train.lr or check the activations"
            )
        self._update()
        if not measure:
            return None
        return self._shared(metrics) | {"grad_norm": norm, "lr": self.lr(self.step - 1)}

    def lr(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        train = self.config.train
        return train.lr * factor(train.lr_schedule, step, train.steps) * rewarmed(train.resample, step, train.steps)

    def _micro_step(
        self,
        micro: Batch,
        more: Callable[[Tensor], Terms] | None,
        fired: list[Tensor],
        measure: bool,
        metrics: dict,
    ) -> dict:
        parts, d, objective = self.config.train.accumulate, self.dictionary, self.objective
        x, y = d.normalize_inputs(micro), d.normalize_targets(micro)
        code = d.analyse(x, self._dead(), objective.needs_norms, objective.needs_pre)
        terms, y_hat = objective.terms(code, x, y, self.step, self.dead_totals)
        if more:
            terms |= more(self.shards.agreed(y_hat))
        weighted = sum(weight * term for weight, term, _ in terms.values())
        # Exactly 1, or NaN where an input is not finite: such a row may win no place and would else leave no trace.
        sound = 1 + 0 * x.sum()
        (weighted * sound / parts).backward()
        with torch.no_grad():
            for f, features in zip(fired, code.features, strict=True):
                f |= features.count() > 0
            if not measure:
                return metrics
            now = self._measure(code, terms, y_hat, y)
            return {k: metrics.get(k, 0.0) + v / parts for k, v in now.items()}

    def _dead(self) -> DeadFeatures | None:
        auxk = self.objective.auxk
        if not (auxk or self.config.train.loss.ghost) or not sum(self.dead_totals):
            return None
        return DeadFeatures(self.dead_masks(), self.dead_totals, auxk or None)

    def dead_masks(self) -> list[Tensor]:
        """[F] of each group: which of this rank's features are dead."""
        return [s >= self.config.train.dead_after_tokens for s in self.silent]

    # ------------------------------------------------------------ after backward

    def _gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter; zero where no feature that it belongs to was active."""
        found = {}
        for name, p in self.parameters.items():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            found[name] = p.grad
        return found

    def _mean_over_replicas(self, fired: list[Tensor]) -> None:
        """Gradients become their mean over replicas, `fired` the union: one collective."""
        if self.shards.replica_group is None:
            return
        grads = list(self._gradients().values())
        pieces = grads + [f.to(grads[0].dtype) for f in fired]
        flat = torch.cat([p.flatten() for p in pieces])
        self.shards.mean_over_replicas_(flat)
        parts = flat.split([p.numel() for p in pieces])
        for grad, part in zip(grads, parts, strict=False):
            grad.copy_(part.view_as(grad))
        for f, part in zip(fired, parts[len(grads) :], strict=True):
            f.copy_(part > 0)

    def _count_silence(self, fired: list[Tensor], tokens: int) -> None:
        for silent, f in zip(self.silent, fired, strict=True):
            silent.add_(tokens).masked_fill_(f, 0)

    @torch.no_grad()
    def _finish_gradients(self) -> float:
        """Project for unit norm, share norms and dead counts, clip. Returns the global norm before clipping."""
        if self.config.dictionary.unit_norm:
            for group in self.dictionary.groups:
                assert group.W_dec.grad is not None
                along = (group.W_dec.grad * group.W_dec).sum(dim=1, keepdim=True)
                group.W_dec.grad -= along * group.W_dec
        own, common = [], []
        for name, grad in self._gradients().items():
            (own if self.dictionary.is_sharded(name) else common).append(grad)
        dead = [mask.sum() for mask in self.dead_masks()]
        shared = self.shards.total(torch.stack([_square(own), *dead]).double())
        of_common, of_own, *totals = torch.cat([_square(common).view(1), shared]).tolist()  # the host waits here
        self.dead_totals = [int(n) for n in totals]
        norm = math.sqrt(of_common + of_own)
        limit = self.config.train.clip_norm
        clipped = limit is not None and norm > limit
        self.shrink = norm / limit if clipped else None
        return norm

    @torch.no_grad()
    def _update(self) -> None:
        optimizers.step(self.optimizer, self.lr(self.step), list(self._gradients().values()), self.shrink)
        if self.config.dictionary.unit_norm:
            for group in self.dictionary.groups:
                group.W_dec.data /= group.norms().unsqueeze(1).clamp(min=1e-12)
        self.step += 1
        self.dictionary.gate.finish_step(self.step)

    # ------------------------------------------------------------ metrics

    def _measure(self, code: Encoding, terms, y_hat: Tensor, y: Tensor) -> dict[str, Tensor]:
        """This rank's metrics: those whose name begins with '+' are parts of a sum over ranks."""
        found = _named(terms)
        error, spread = (y - y_hat).square().sum(), (y - y.mean(dim=0)).square().sum()
        found |= {"of_fit/error": error, "of_fit/spread": spread}
        for g, f in enumerate(code.features):
            found[f"+l0/group_{g}"] = f.l0().double().mean()
        return found

    def _shared(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Summed over ranks where they are parts, averaged over replicas, completed."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in metrics.values()])
        partial = torch.tensor([k.startswith("+") for k in metrics], device=self.device)
        values = torch.where(partial, self.shards.total(values * partial), values)
        self.shards.mean_over_replicas_(values)
        named = {k.lstrip("+"): v for k, v in zip(metrics, values.tolist(), strict=True)}
        weighted = [named.pop(k) for k in list(named) if k.startswith("weighted/")]
        error, spread = named.pop("of_fit/error"), named.pop("of_fit/spread")
        named["explained_variance"] = 1 - error / spread if spread else math.nan
        dead = sum(self.dead_totals) / sum(self.dictionary.sizes)
        l0 = sum(v for k, v in named.items() if k.startswith("l0/"))
        return {"loss": sum(weighted), **named, "l0": l0, "dead_features": dead}

    # ------------------------------------------------------------ state

    def state(self, moments: dict[str, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """All tensors that resuming needs, each described as a part of the whole. `moments`: the optimizer's, as
        `_moments` gave them."""
        d, moments = self.dictionary, moments or self._moments()
        tensors = checkpoint.dictionary_tensors(d)
        for name, held in moments.items():
            for key, value in held.items():
                split = d.is_sharded(name) and key != "step"
                features = d.sizes[checkpoint.group_of(name)] if split else 0
                tensors[f"optimizer.{name}.{key}"] = (
                    checkpoint.sharded(value, features, self.shards) if split else value
                )
        for g, silent in enumerate(self.silent):
            tensors[f"silent_tokens.{g}"] = checkpoint.sharded(silent, d.sizes[g], self.shards)
        return tensors

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        return {name: optimizers.moments(self.optimizer, p) for name, p in self.parameters.items()}

    def _take(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, p in self.parameters.items():
            optimizers.put(self.optimizer, p, moments[name])

    def save(self, run_dir: str, background: checkpoint.Background | None = None) -> None:
        """Write a checkpoint of this step (all ranks); with `background` while training goes on, from a copy."""
        facts = {
            "tokens": self.step * self.config.train.batch_tokens,
            "wiring": checkpoint.describe(self.dictionary.wiring),
        }
        moments = self._moments()
        keep, tensors = self.config.train.keep, self.state(moments)
        checkpoint.save(run_dir, self.step, tensors, facts, keep, self.shards, background)
        self._take(moments)

    def resume(self, run_dir: str, step: int) -> None:
        """Go back to a checkpoint, written by any number of ranks (all ranks). Raises UserError on a converted run."""
        if "converted_from" in checkpoint.facts(run_dir, step):
            raise UserError(f"{run_dir}: a converted dictionary, without an optimizer's state; choose another --out")
        moments = self._moments()
        checkpoint.load(run_dir, step, self.state(moments), self.shards)
        self._take(moments)
        self.step = step
        dead = torch.stack([mask.sum() for mask in self.dead_masks()])
        self.dead_totals = [int(n) for n in self.shards.total(dead).tolist()]


def _named(terms: Terms) -> dict[str, Tensor]:
    """Metrics of loss terms: each as it is, and as it counts."""
    found = {}
    for name, (weight, term, partial) in terms.items():
        found[("+" if partial else "") + name] = term.detach()
        found[("+" if partial else "") + f"weighted/{name}"] = weight * term.detach()
    return found


def _square(tensors: list[Tensor]) -> Tensor:
    """Σ of squares over tensors, in float64 over pieces: in float32 a CPU would lose 2 % of 2^24 numbers."""
    norms = []
    for flat in (t.flatten() for t in tensors):
        pieces = flat[: flat.numel() // PIECE * PIECE]
        norms += [torch.linalg.vector_norm(pieces.view(-1, PIECE), dim=1), flat[len(pieces) :].norm().view(1)]
    return torch.cat(norms).double().square().sum()
