"""Three ways to take one training step of the same dictionary, for the benchmarks.

    naive    as most trainers do it: a decoder matrix for each source → target pair, dense activations, float32, plain
             Adam
    dense    the best dense step: feature-major decoders stacked over targets, one product a group, selection by
             candidates, fused Adam, bfloat16 where the hardware is faster with it
    engine   Learner.train_step, products chosen by density

All start from the same weights, and compute the same loss and gradient; `dense` trains the engine's own tensors.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards, Wiring
from xlc_ray.dictionary.build import build, make_wiring
from xlc_ray.dictionary.shards import largest

Batch = dict[str, Tensor]
PENALTY = 1e-3


def settings(o, dtype: str, products: str = "auto") -> Config:
    """The settings of a run with the shape of the command line `o`."""
    ranked = o.gate in ("topk", "batchtopk")
    penalty = None if ranked else {"kind": "tanh", "coefficient": PENALTY}
    tree = {
        "out": "unused",
        "model": {"name": "unused"},
        "text": {"dataset": "unused"},
        "generate": {"tokens": 1, "held_out_tokens": 1},
        "source": {"path": "unused"},
        "dictionary": {
            "wiring": {"kind": o.wiring},
            "features": o.features,
            "gate": {"kind": o.gate} | ({"k": o.k} if ranked else {}),
            "decoder_norm": 1.0,
            "products": products,
        },
        "train": {
            "steps": 1000,
            "batch_tokens": o.batch,
            "lr": 1e-4,
            "precision": dtype,
            "loss": {"sparsity": penalty},
        },
        "cluster": {"tensor_parallel": o.tp},
    }
    return Config.model_validate(tree)


def wiring_of(o, config: Config) -> Wiring:
    """The wiring of the command line: `--layers` sites of `--width`."""
    return make_wiring(config.dictionary.wiring, o.layers, o.width)


def batches(wires: Wiring, rows: int, count: int, device: torch.device) -> list[Batch]:
    """Synthetic activations with E|x|² = d: sparse sums of a shared dictionary of directions per site, and noise."""
    draw = torch.Generator().manual_seed(0)
    made: list[Batch] = [{} for _ in range(count)]
    for site, width in wires.widths.items():
        directions = torch.randn(2 * width, width, generator=draw)
        for batch in made:
            codes = torch.randn(rows, 2 * width, generator=draw).relu_()
            codes *= torch.rand(rows, 2 * width, generator=draw) < 0.02
            x = codes @ directions + 0.5 * torch.randn(rows, width, generator=draw)
            batch[site] = (x * (width / x.square().sum(dim=1).mean()).sqrt()).to(device)
    return made


def dictionary_of(config: Config, wires: Wiring, o, sample: Batch, shards: Shards) -> Dictionary:
    """A fresh dictionary whose threshold gates let about k features a token through, as a trained one would."""
    made = build(config.dictionary, wires, 0, shards).to(next(iter(sample.values())).device)
    if o.gate in ("topk", "batchtopk"):
        return made
    share = 1 - o.k / sum(made.sizes)
    with torch.no_grad():
        x = made.normalize_inputs(sample)[:64]
        for g, group in enumerate(made.groups):
            pre = nnf.linear(_columns(x, wires.read_spans(g)), group.W_enc, group.b_enc)
            level = np.quantile(pre.float().cpu().numpy(), share)
            group.b_enc -= float(level) - float(torch.as_tensor(made.gate.threshold(g)).mean())
    return made


# ---------------------------------------------------------------- (a)


class Naive:
    """Separate decoders, dense activations, no fusion."""

    def __init__(self, like: Dictionary, config: Config):
        self.wiring, self.config, wires = like.wiring, config, like.wiring
        self.gate = copy.deepcopy(like.gate)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleDict()
        self.bias = nn.Parameter(like.b_dec.detach().clone())
        device = like.b_dec.device
        with torch.no_grad():
            for g, group in enumerate(like.groups):
                features, width = group.W_enc.shape
                encoder = nn.Linear(width, features, device=device)
                encoder.weight.copy_(group.W_enc)
                encoder.bias.copy_(group.b_enc)
                self.encoders.append(encoder)
                for site, columns in wires.columns(wires.writes[g]).items():
                    decoder = nn.Linear(features, wires.widths[site], bias=False, device=device)
                    decoder.weight.copy_(group.W_dec[:, columns].T)
                    self.decoders[_key(g, site)] = decoder
        self.parameters = [*self.encoders.parameters(), *self.decoders.parameters(), self.bias]
        self.parameters += list(self.gate.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.train.lr, fused=False)

    def step(self, batch: Batch) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        reads = [torch.cat([batch[s] for s in sites], dim=1) for sites in self.wiring.reads]
        pre = [encode(x) for encode, x in zip(self.encoders, reads, strict=True)]
        features = self._activate(pre)
        loss = self._penalty(features)
        columns = self.wiring.columns(self.wiring.written_sites)
        for site in self.wiring.written_sites:
            found = self.bias[columns[site]]
            for g, writes in enumerate(self.wiring.writes):
                if site in writes:
                    found = found + self.decoders[_key(g, site)](features[g])
            loss = loss + (found - batch[site]).square().sum(dim=1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()

    def _activate(self, pre: list[Tensor]) -> list[Tensor]:
        gate = self.config.dictionary.gate
        if gate.kind == "relu":
            return [torch.relu(p) for p in pre]
        if gate.kind == "jumprelu":
            return [self.gate.activate(p, g, None) for g, p in enumerate(pre)]
        whole = torch.cat(pre, dim=1).relu()
        rows = whole.flatten()[None] if gate.kind == "batchtopk" else whole
        k = gate.k * len(whole) if gate.kind == "batchtopk" else gate.k
        values, where = rows.topk(k, dim=1)
        kept = torch.zeros_like(rows).scatter(1, where, values).view_as(whole)
        return list(kept.split([p.shape[1] for p in pre], dim=1))

    def _penalty(self, features: list[Tensor]) -> Tensor | float:
        penalty = self.config.train.loss.sparsity
        if penalty is None:
            return 0.0
        total = 0.0
        for g, f in enumerate(features):
            squares = [self.decoders[_key(g, s)].weight.square().sum(dim=0) for s in self.wiring.writes[g]]
            total = total + torch.tanh(penalty.c * f * torch.stack(squares).sum(dim=0).sqrt()).sum() / len(f)
        return penalty.coefficient * total


def _key(g: int, site: str) -> str:
    return f"{g}->{site.replace('.', '_')}"


# ---------------------------------------------------------------- (b)


class Dense:
    """Stacked decoders, one product a group, fused Adam, on the tensors of a given dictionary."""

    def __init__(self, like: Dictionary, config: Config, optimizer: torch.optim.Optimizer | None, compiled: bool):
        self.like, self.config = like, config
        self.parameters = list(like.parameters())
        self.optimizer = optimizer or torch.optim.Adam(self.parameters, lr=config.train.lr, fused=True)
        self.reduced = config.train.precision == "bfloat16"
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def step(self, batch: Batch) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.like.b_dec.device.type, torch.bfloat16, enabled=self.reduced):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> float:
        """The loss, without a step."""
        return self._loss(batch).item()

    def _loss(self, batch: Batch) -> Tensor:
        d, penalty = self.like, self.config.train.loss.sparsity
        x = torch.cat([batch[s] for s in d.wiring.read_sites], dim=1)
        y = torch.cat([batch[s] for s in d.wiring.written_sites], dim=1)
        pre = [
            nnf.linear(_columns(x, d.wiring.read_spans(g)), group.W_enc, group.b_enc)
            for g, group in enumerate(d.groups)
        ]
        features = self._activate(pre)
        parts: dict[str, list[Tensor]] = {s: [] for s in d.wiring.written_sites}
        for g, (f, group) in enumerate(zip(features, d.groups, strict=True)):
            whole = f @ group.W_dec
            for site, columns in d.wiring.columns(d.wiring.writes[g]).items():
                parts[site].append(whole[:, columns])
        y_hat = torch.cat([sum(p[1:], p[0]) for p in parts.values()], dim=1) + d.b_dec
        loss = (y_hat - y).square().sum(dim=1).mean()
        if penalty:
            for f, group in zip(features, d.groups, strict=True):
                loss = loss + penalty.coefficient * torch.tanh(penalty.c * f * group.norms()).sum() / len(f)
        return loss

    def _activate(self, pre: list[Tensor]) -> list[Tensor]:
        gate = self.config.dictionary.gate
        if gate.kind == "relu":
            return [torch.relu(p) for p in pre]
        if gate.kind == "jumprelu":
            return [self.like.gate.activate(p, g, None) for g, p in enumerate(pre)]
        with torch.no_grad():
            least = _least_of_batch(pre, gate.k) if gate.kind == "batchtopk" else _least_of_tokens(pre, gate.k)
        return [p.where(p >= least, 0) for p in pre]


def _least_of_batch(pre: list[Tensor], k: int) -> Tensor:
    """The k·B-th largest of all: what is not among the best of one group cannot be among the best of all."""
    places = k * len(pre[0])
    best = largest(pre[0].flatten()[None].float(), places)[0] if pre[0].numel() > places else pre[0].flatten().float()
    for p in pre[1:]:
        rivals = p[p > best.amin()].float() if best.numel() >= places else p.flatten().float()
        best = torch.cat([best, rivals])
        best = largest(best[None], places)[0] if best.numel() > places else best
    return best.amin().clamp(min=2.0**-126)


def _least_of_tokens(pre: list[Tensor], k: int) -> Tensor:
    whole = torch.cat(pre, dim=1).float()
    return largest(whole, k).amin(dim=1, keepdim=True).clamp(min=2.0**-126)


def _columns(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    return x[:, spans[0]] if len(spans) == 1 else torch.cat([x[:, s] for s in spans], dim=1)
