"""What training minimises: terms of a batch's code and reconstruction, and terms of the weights alone.

    loss = c ‖y - ŷ‖² + λ(step) sparsity + … (losses.py has each)       weighted sums, whose parts are metrics too

Which of them there are is said by `train.loss`, and by the gate where it brings an auxiliary loss of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlc_ray.config import Config
from xlc_ray.config.losses import Sparsity
from xlc_ray.dictionary import connection, losses, nested
from xlc_ray.dictionary.columns import columns, split
from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.encoding import Encoding
from xlc_ray.dictionary.features import Features
from xlc_ray.training.schedules import factor

Terms = dict[str, tuple[float, Tensor, bool]]
"""Name → (weight, term, whether it is this rank's part of a sum over ranks)."""


class Objective:
    """The terms that the settings ask for, and what they need of the encoding.

    `weights` [W]: of the columns of the reconstruction error, or None; `parts`: those of the wiring, each with its
    weights; `auxk`: dead features of a group that AuxK takes, 0 without it; `needs_norms`, `needs_pre`: whether terms
    need decoder norms, and all pre-activations."""

    def __init__(self, dictionary: Dictionary, config: Config):
        self.dictionary, self.train = dictionary, config.train
        loss = config.train.loss
        widths = [dictionary.wiring.widths[s] for s in dictionary.wiring.written_sites]
        self.weights = losses.site_weights(widths, True).to(dictionary.b_dec) if loss.scale == "per_dim" else None
        own = None if self.weights is None else self.weights.unsqueeze(0)
        self.parts = [
            (spans, groups, None if own is None else columns(own, spans)[0])
            for spans, groups in dictionary.wiring.parts
        ]
        self.auxk = loss.auxk.k or max(1, max(widths) // 2) if loss.auxk else 0
        prefixes = loss.matryoshka.prefixes if loss.matryoshka else ()
        self.cuts = nested.cuts(prefixes, dictionary.sizes, dictionary.shards) if prefixes else None
        self.others = connection.others(dictionary, loss.connection.run) if loss.connection else {}
        counted = loss.sparsity is not None and loss.sparsity.kind == "l0"
        by_norm = loss.sparsity is not None and loss.sparsity.kind != "l0" and loss.sparsity.decoder_norm
        self.needs_pre = (counted and dictionary.gate.counts_all) or loss.preactivation > 0
        self.needs_norms = by_norm or loss.preactivation > 0

    def terms(self, code: Encoding, x: Tensor, y: Tensor, step: int, dead_totals: list[int]) -> tuple[Terms, Tensor]:
        """The terms of a micro-batch, and its reconstruction ŷ [B, W]. `dead_totals`: dead features of each group."""
        codes = [code.features] + ([code.revived] if code.revived else [])
        found, norms = self.dictionary.decode_all(codes, x, code.norms, self.cuts, self._frozen(code))
        count = len(self.cuts[0]) if self.cuts else 1
        prefixes, others = found[:count], found[count:]
        terms = self._of_fit(prefixes, y) | self._of_code(code, norms, step)
        return terms | self._auxiliary(code, others, x, y, y - prefixes[-1], dead_totals), prefixes[-1]

    def of_weights(self) -> Terms:
        """Terms of the weights alone: once a step, whatever the batch."""
        if (c := self.train.loss.connection) is None:
            return {}
        return {"connection": (c.coefficient, connection.overlap(self.dictionary, self.others), True)}

    def _of_fit(self, prefixes: list[Tensor], y: Tensor) -> Terms:
        """Of the reconstructions, of which the last is the whole."""
        loss, end_to_end = self.train.loss, self.train.end_to_end
        if loss.matryoshka:
            fit = losses.of_prefixes(prefixes, y, self.weights, loss.matryoshka.combine == "mean")
        else:
            fit = losses.reconstruction(prefixes[-1], y, self.weights)
        return {"reconstruction": (end_to_end.reconstruction if end_to_end else 1.0, fit, False)}

    def _of_code(self, code: Encoding, norms: list[Tensor] | None, step: int) -> Terms:
        loss, terms = self.train.loss, {}
        if (s := loss.sparsity) is not None:
            weight = s.coefficient * factor(s.schedule, step, self.train.steps)
            terms["sparsity"] = (weight, self._sparsity(code, norms, s, step), s.target_l0 is None)
        if loss.preactivation:
            assert code.pre is not None
            assert norms is not None
            pull = losses.preactivation(code.pre, self.dictionary.gate, norms)
            terms["preactivation"] = (loss.preactivation, pull, True)
        return terms

    def _sparsity(self, code: Encoding, norms: list[Tensor] | None, s: Sparsity, step: int) -> Tensor:
        d, by = self.dictionary, norms if s.decoder_norm else None
        if s.kind == "l0" and s.target_l0:
            return losses.l0_to_target(code.features, d.gate, s.target_l0, d.shards, code.pre)
        if s.kind == "l0":
            return losses.l0(code.features, d.gate, code.pre)
        penalised = [
            Features(d.gate.penalised(f.values, f.pre, g, f.support), f.pre, f.support)
            for g, f in enumerate(code.features)
        ]
        if s.kind == "tanh":
            return losses.tanh(penalised, by, s.c)
        if s.kind == "lp":
            p = losses.exponent(s.p_end, s.p_hold, step, self.train.steps)
            return losses.lp(penalised, by, p, d.shards if s.keep_strength else None)
        return losses.l1(penalised, by)

    def _auxiliary(
        self, code: Encoding, others: list[Tensor], x: Tensor, y: Tensor, error: Tensor, dead_totals: list[int]
    ) -> Terms:
        """Of `others`: what dead features, then the gate's frozen code, reconstruct, where they are there."""
        d = self.dictionary
        terms = self._of_dead(others[0], error, dead_totals) if code.revived else {}
        if d.gate.auxiliary:
            term = losses.reconstruction(others[-1] + d.offset(x).detach(), y, self.weights)
            terms["auxiliary"] = (d.gate.auxiliary, term, False)
        return terms

    def _of_dead(self, revived: Tensor, error: Tensor, dead_totals: list[int]) -> Terms:
        """AuxK or ghost gradients, in each dictionary of its own that has dead features."""
        auxk, ghost, each = self.train.loss.auxk, self.train.loss.ghost, []
        spans = [spans for spans, _, _ in self.parts]
        sides = zip(self.parts, split(revived, spans), split(error, spans), strict=True)
        for (_, groups, weights), e_hat, e in sides:
            dead = sum(dead_totals[g] for g in groups)
            if dead and auxk:
                each.append(min(1.0, dead / (self.auxk * len(groups))) * losses.auxk(e_hat, e, weights))
            elif dead:
                each.append(losses.ghost(e_hat, e, weights))
        name, settings = ("auxk", auxk) if auxk else ("ghost", ghost)
        assert settings is not None
        return {name: (settings.coefficient, torch.stack(each).sum(), False)}

    def _frozen(self, code: Encoding) -> list[list[Features]]:
        """The code that the gate's auxiliary loss decodes with a frozen decoder, if it has one."""
        gate = self.dictionary.gate
        if not gate.auxiliary:
            return []
        values = [gate.auxiliary_values(f.pre, g, f.support) for g, f in enumerate(code.features)]
        return [[Features(v, f.pre, f.support) for v, f in zip(values, code.features, strict=True)]]
