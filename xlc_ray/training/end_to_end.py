"""End-to-end training: a dictionary is judged by what the language model does when it stands in (Braun et al. 2024,
arXiv 2405.12241).

    loss = c_r ‖y - ŷ‖² + Σ_s (c_kl KL_s + c_d D_s) + penalties          s: the written sites

    KL_s = (1/B) Σ_b KL(p_b ‖ p_b[s ← ŷ_s])                              nats a token, p of the next token after b
    D_s  = (1/B) Σ_b mean_t ‖(a_bt - a_bt[s ← ŷ_s]) / s_t‖²              t: later(s), s_t² = E‖a_t‖² / width

[s ← ŷ_s] is a run of the frozen model with ŷ_s, in the model's units, in the place of the B kept tokens of site s
alone; other tokens keep what the model computes there. Features come from the original run, which is what the spliced
run holds before s. So dictionaries of several sites train side by side, each as if alone, and everything but these two
terms is as in ordinary training. The gradient goes through the spliced model to ŷ. (The paper's loss has neither s_t
nor the sum over sites; its downstream term is the mean over t too.)

Each rank runs the frozen model on its replica's windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from xlc_ray.activations import sites
from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.passages import Passages, PassageStream
from xlc_ray.activations.splice import Visit, capture, logits_at, substitute
from xlc_ray.activations.store import Store
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary import Dictionary
from xlc_ray.training.learner import Micro
from xlc_ray.training.objective import Terms


class EndToEnd:
    """The frozen language model, the text that it reads, and what it says of reconstructions."""

    def __init__(self, dictionary: Dictionary, config: Config, data: Store):
        assert config.train.end_to_end is not None
        self.dictionary, self.train, self.settings = dictionary, config.train, config.train.end_to_end
        self.shards, self.device = dictionary.shards, dictionary.b_dec.device
        self.model = LanguageModel(config.model, self.device)
        if config.train.precision == "float64":
            self.model.hf.double()
        self.stream = PassageStream(data, config.seed)
        self.model.check(torch.from_numpy(self.stream.tokens))
        written = dictionary.wiring.written_sites
        layers = self.model.num_layers if self.settings.downstream else 0
        self.later = {site: later(site, layers) for site in written}
        if self.settings.downstream and not any(self.later.values()):
            raise UserError(
                f"train.end_to_end.downstream: no block of the model comes after {', '.join(written)}; set it to 0"
            )
        self.scales = self._scales(min(config.train.calibration_tokens, self.stream.rows))

    def batch(self, step: int) -> Iterator[Micro]:
        """This replica's micro-batches of a step (from 0): activations of the original run, and the terms of ŷ."""
        micro = self.train.batch_tokens // self.train.accumulate
        share = micro // self.shards.replicas
        for i in range(self.train.accumulate):
            start = step * self.train.batch_tokens + i * micro + self.shards.replica * share
            yield self._micro(self.stream.read(start, start + share).to(self.device))

    def _micro(self, passages: Passages) -> Micro:
        seen: dict[str, Tensor] = {}
        names = {*self.dictionary.wiring.sites, *(t for later in self.later.values() for t in later)}
        with torch.no_grad():
            original = self._log_probabilities(passages, capture(names, passages.keep, seen))
        return seen, lambda y_hat: self.terms(passages, original, seen, y_hat)

    def terms(self, passages: Passages, original: Tensor, seen: dict[str, Tensor], y_hat: Tensor) -> Terms:
        """KL and downstream error of ŷ [B, W], given the original run's log-probabilities [B, vocabulary] and sites."""
        kl, downstream = y_hat.new_zeros(()), y_hat.new_zeros(())
        for site, rows in self.dictionary.denormalize(y_hat).items():
            found: dict[str, Tensor] = {}
            visits = substitute({site: rows}, passages.keep) | capture(self.later[site], passages.keep, found)
            kl = kl + divergence(original, self._log_probabilities(passages, visits))
            for t, value in found.items():
                width = value.shape[1] if self.train.loss.scale == "per_dim" else 1
                error = ((value - seen[t]) / self.scales[t]).square().sum() / (value.shape[0] * width)
                downstream = downstream + error / len(found)
        # With coefficient 0 it is still worth knowing, but not worth a backward pass through the model.
        terms: Terms = {"kl": (self.settings.kl, kl if self.settings.kl else kl.detach(), False)}
        if self.settings.downstream:
            terms["downstream"] = (self.settings.downstream, downstream, False)
        return terms

    def _log_probabilities(self, passages: Passages, visits: Mapping[str, Visit]) -> Tensor:
        """Of the token after each kept one: [B, vocabulary], at least float32."""
        logits = logits_at(self.model, passages.tokens, passages.attention, visits, passages.keep)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)

    def _scales(self, rows: int) -> dict[str, float]:
        """s_t of each later site over the first rows of the stream: the same on every rank and after resuming."""
        names = sorted({t for later in self.later.values() for t in later}, key=sites.order_key)
        squares, width = dict.fromkeys(names, 0.0), self.model.width
        piece = max(1, self.train.batch_tokens // (self.shards.replicas * self.train.accumulate))
        for start in range(0, rows if names else 0, piece):
            passages = self.stream.read(start, min(start + piece, rows)).to(self.device)
            for site, value in self.model.harvest(passages.tokens, passages.length, names).items():
                squares[site] += value[passages.keep].double().square().sum().item()
        return {site: math.sqrt(square / (rows * width)) for site, square in squares.items()}


def later(site: str, layers: int) -> list[str]:
    """resid_post sites of a model of so many layers whose error is not that of the site itself: those with a
    sublayer of the model in between."""
    kind, layer = sites.parse(site)
    return [f"resid_post.{n}" for n in range(layer + (kind in ("mlp_out", "resid_post")), layers)]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(1/B) Σ_b KL(p_b ‖ q_b) of log-probabilities [B, vocabulary]; tokens that p rules out count nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum() / log_p.shape[0]
