"""The replacement model: how well the language model still predicts when a dictionary stands in for its activations.

    ce_recovered   = (H_ablated - H_replaced) / (H_ablated - H_original)      H = cross-entropy, nats a token
    kl             = E KL(p_original ‖ p_replaced)
    top1_agreement = E 1[argmax p_original = argmax p_replaced]

*Positions.* Only kept positions (those the dictionary is trained on) are replaced or ablated (set to zero); BOS,
padding and ignored first tokens keep what the model computes there. Scored are the predictions made **from** a kept
position i whose next token i + 1 lies within the window's real tokens; every metric is a sum over all scored tokens
of all windows, divided by their number.

*All written sites at once.* Where every site a group reads comes no later in the forward pass than every site it
writes (SAEs, transcoders, CLTs, causal crosscoders), this is the true replacement model: going up the layers, a group
encodes what arrives at its read sites in the **modified** stream, and a written site becomes the sum of all groups
that write it, plus its bias (`replacement_inputs: modified`). An acausal crosscoder cannot be computed that way; its
features come from the clean run (`replacement_inputs: clean`). *One site at a time*: features of the clean run, and
only that site substituted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.sites import order_key
from xlc_ray.activations.splice import Visit, capture, logits_at, put, substitute
from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary, Features, Wiring

ROWS_AT_ONCE = 512
"""Rows of logits turned into float32 probabilities in one piece: vocabularies are wide."""


@dataclass(frozen=True)
class Batch:
    """Windows of tokens, and which positions are replaced and scored. Tensors are on the model's device."""

    tokens: Tensor
    """[n, context] int64."""
    attention: Tensor
    """[n, context] int64: 1 = real token."""
    keep: Tensor
    """[n, context] bool: replaced or ablated."""
    scored: Tensor
    """[n, context] bool: kept, and the next token is real."""
    targets: Tensor
    """[scored] int64: those next tokens."""


def prepare(tokens: Tensor, length: Tensor, keep: Tensor, device: str | torch.device = "cpu") -> Batch:
    """A Batch of windows tokens [n, context], of which the first length [n] are real and keep [n, context] are kept."""
    tokens, length, keep = tokens.long().to(device), length.long().to(device), keep.bool().to(device)
    real = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
    assert not (keep & ~real).any(), "padding is never kept"
    scored = torch.zeros_like(keep)
    scored[:, :-1] = keep[:, :-1] & real[:, 1:]
    targets = tokens.roll(-1, dims=1)[scored]
    return Batch(tokens, real.long(), keep, scored, targets)


def replaceable_in_place(wiring: Wiring) -> bool:
    """Whether every group can be computed in the modified stream: it reads nothing later than what it writes."""
    rows = zip(wiring.reads, wiring.writes, strict=True)
    return all(max(map(order_key, reads)) <= min(map(order_key, writes)) for reads, writes in rows)


def forward(model: LanguageModel, batch: Batch, visits: Mapping[str, Visit]) -> Tensor:
    """Logits [scored, vocabulary] of one pass of a LanguageModel in which each named site goes through its visit."""
    with torch.no_grad():
        return logits_at(model, batch.tokens, batch.attention, visits, batch.scored)


def replace_all(
    dictionary: Dictionary, keep: Tensor, edit: Callable[[int, Features], Features] = lambda g, features: features
) -> dict[str, Visit]:
    """Visits that make the replacement model: groups encode the modified stream and write into it, layer by layer.

    `edit` sees each group's features and returns those to write."""
    wiring = dictionary.wiring
    inputs: dict[str, Tensor] = {}
    features: dict[int, Features] = {}
    completes = [max(reads, key=order_key) for reads in wiring.reads]

    def visit(site: str, value: Tensor) -> Tensor | None:
        inputs[site] = value[keep].float()
        for g, last in enumerate(completes):
            if last == site:
                features[g] = edit(g, dictionary.encode_group(g, {s: inputs[s] for s in wiring.reads[g]}))
        writers = [g for g, writes in enumerate(wiring.writes) if site in writes]
        if not writers:
            return None
        return put(value, keep, dictionary.decode_site(site, {g: features[g] for g in writers}, inputs))

    names = wiring.sites
    return {site: lambda value, site=site: visit(site, value) for site in names}


def ablate(names: Iterable[str], keep: Tensor) -> dict[str, Visit]:
    """Visits that set the kept positions of each site to zero."""
    return {site: lambda value: value.masked_fill(keep[..., None], 0) for site in names}


@dataclass
class Score:
    """Sums over scored tokens of one changed model, against the original."""

    tokens: int = 0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    agreement: float = 0.0

    def update(self, logits: Tensor, original: Tensor, targets: Tensor) -> None:
        """Add logits and the original's logits, both [n, vocabulary], with the true next tokens [n]."""
        parts = (part.split(ROWS_AT_ONCE) for part in (logits, original, targets))
        for here, there, target in zip(*parts, strict=True):
            log_q, log_p = here.float().log_softmax(1), there.float().log_softmax(1)
            p = log_p.exp()
            divergence = torch.where(p > 0, p * (log_p - log_q), 0.0)
            self.cross_entropy -= log_q.gather(1, target[:, None]).double().sum().item()
            self.divergence += divergence.sum(1).double().sum().item()
            self.agreement += (here.argmax(1) == there.argmax(1)).sum().item()
        self.tokens += len(targets)

    def merge(self, other: Score) -> None:
        """Add the tokens that another score saw."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def ce(self) -> float:
        """Mean cross-entropy, nats a token. Some token must have been scored."""
        return self.cross_entropy / self.tokens


@dataclass
class Scores:
    """The scores of one model as it is, and with sites replaced or ablated: each of `sites` alone, and None = all."""

    sites: tuple[str, ...]
    clean: Score
    replaced: dict[str | None, Score]
    ablated: dict[str | None, Score]

    @classmethod
    def empty(cls, sites: tuple[str, ...]) -> Scores:
        """Before any batch, of one model's written sites."""
        replaced, ablated = ({v: Score() for v in (None, *sites)} for _ in range(2))
        return cls(sites, Score(), replaced, ablated)

    def update(
        self, model: LanguageModel, batch: Batch, original: Tensor, visits: Mapping[str | None, Mapping[str, Visit]]
    ) -> None:
        """Add a batch, with the model's clean logits on it and the visits that make each replacement."""
        self.clean.update(original, original, batch.targets)
        for variant, replaced in self.replaced.items():
            names = self.sites if variant is None else (variant,)
            replaced.update(forward(model, batch, visits[variant]), original, batch.targets)
            self.ablated[variant].update(forward(model, batch, ablate(names, batch.keep)), original, batch.targets)

    def merge(self, other: Scores) -> None:
        """Add the windows that another accumulator saw."""
        assert self.sites == other.sites
        self.clean.merge(other.clean)
        for variant in self.replaced:
            self.replaced[variant].merge(other.replaced[variant])
            self.ablated[variant].merge(other.ablated[variant])

    def compute(self, variant: str | None, name: str) -> dict[str, float | None]:
        """The metrics of one variant; `name` says in an error which it was."""
        return compare(self.clean, self.replaced[variant], self.ablated[variant], name)


@dataclass
class Replacement:
    """What a replacement model scored on windows of text."""

    scores: Scores
    inputs: str
    """Where all sites at once are replaced: "modified" or "clean", as at the top of this file."""
    windows: int = 0

    def merge(self, other: Replacement) -> None:
        """Add the windows that another accumulator saw."""
        self.scores.merge(other.scores)
        self.windows += other.windows

    def compute(self) -> dict[str, Any]:
        """tokens (scored), windows, ce_original, replacement_inputs, `all` (every written site at once) and `sites`
        (each alone): ce_replaced, ce_ablated, ce_recovered (None where ablation changes nothing), kl, kl_ablated,
        top1_agreement. Raises UserError where no token was scored, or where a cross-entropy is not finite.
        """
        check_scored(self.scores.clean.tokens)
        return {
            "tokens": self.scores.clean.tokens,
            "windows": self.windows,
            "replacement_inputs": self.inputs,
            "ce_original": self.scores.clean.ce,
            "all": self.scores.compute(None, "all written sites"),
            "sites": {site: self.scores.compute(site, site) for site in self.scores.sites},
        }


def check_scored(tokens: int) -> None:
    """Raises UserError where there is nothing to divide by."""
    if not tokens:
        raise UserError("evaluate.windows: no held-out token can be scored; use more windows or a longer text.context")


def evaluate_replacement(dictionary: Dictionary, model: LanguageModel, batches: Iterable[Batch]) -> Replacement:
    """Score the replacement model on windows of text.

    `dictionary` is in its inference form, on the device of `model`. Raises UserError where the model cannot read the
    windows.
    """
    wiring = dictionary.wiring
    inputs = "modified" if replaceable_in_place(wiring) else "clean"
    found = Replacement(Scores.empty(tuple(wiring.written_sites)), inputs)
    for batch in batches:
        model.check(batch.tokens)
        original, visits = _clean_run(dictionary, model, batch)
        found.scores.update(model, batch, original, visits)
        found.windows += len(batch.tokens)
    return found


@torch.no_grad()
def _clean_run(
    dictionary: Dictionary, model: LanguageModel, batch: Batch
) -> tuple[Tensor, dict[str | None, dict[str, Visit]]]:
    """The original logits, and the visits that replace all written sites (key None) or one of them."""
    wiring, rows = dictionary.wiring, {}
    names = wiring.sites
    original = forward(model, batch, capture(names, batch.keep, rows))
    rebuilt = dictionary.reconstruct(rows)
    visits: dict[str | None, dict[str, Visit]] = {
        site: substitute({site: rebuilt[site]}, batch.keep) for site in wiring.written_sites
    }
    in_place = replaceable_in_place(wiring)
    visits[None] = replace_all(dictionary, batch.keep) if in_place else substitute(rebuilt, batch.keep)
    return original, visits


def compare(clean: Score, replaced: Score, ablated: Score, name: str) -> dict[str, float | None]:
    """The metrics of one variant; `name` says in an error which it was."""
    if not math.isfinite(replaced.cross_entropy + ablated.cross_entropy):
        raise UserError(f"evaluate: {name}: the cross-entropy is not finite; try model.dtype: float32")
    gap = ablated.ce - clean.ce
    return {
        "ce_replaced": replaced.ce,
        "ce_ablated": ablated.ce,
        "ce_recovered": (ablated.ce - replaced.ce) / gap if gap else None,
        "kl": replaced.divergence / replaced.tokens,
        "kl_ablated": ablated.divergence / ablated.tokens,
        "top1_agreement": replaced.agreement / replaced.tokens,
    }
