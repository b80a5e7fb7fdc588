"""How each gate is trained in the table of gates.py: settings that its paper or its users would take, and nothing else.

Penalised gates without `target_l0` name the coefficient that a search starts from, for each wiring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RISING = {"schedule": {"kind": "constant", "warmup": 1.0}}
"""A penalty that rises linearly over the whole run."""
TWENTIETH = {"schedule": {"kind": "constant", "warmup": 0.05}}


@dataclass(frozen=True)
class Recipe:
    """Settings of `dictionary.gate`, of the penalty (without coefficient or target), and what goes with them."""

    gate: dict[str, Any]
    penalty: dict[str, Any] | None = None
    also: dict[str, Any] = field(default_factory=dict)
    """Other losses."""
    unit_norm: bool = False
    starts: Mapping[str, float] = field(default_factory=dict)
    """Wiring → the coefficient to begin with, where the l0 is searched."""

    @property
    def searched(self) -> bool:
        """Whether the l0 follows from a coefficient that has to be found."""
        return bool(self.starts)

    def dictionary(self, l0: int, steps: int) -> dict[str, Any]:
        """`gate`, `unit_norm`, for the section `dictionary`."""
        gate = dict(self.gate)
        if gate["kind"] in ("topk", "batchtopk"):
            gate |= {"k": l0, "threshold_start": steps * 9 // 10, "threshold_decay": 0.99}
        return {"gate": gate, "unit_norm": self.unit_norm}

    def loss(self, l0: int, coefficient: float | None) -> dict[str, Any]:
        """The section `train.loss`."""
        if self.penalty is None:
            return dict(self.also)
        own = {"coefficient": coefficient} if self.searched else {"target_l0": l0}
        return {"sparsity": self.penalty | own} | self.also


def same(value: float) -> dict[str, float]:
    """The same start for every wiring."""
    return dict.fromkeys(("sae", "transcoder", "clt", "crosscoder", "model_diff"), value)


REVIVED = {"auxk": {}}
L1 = {"kind": "l1", **TWENTIETH}
TANH = {"kind": "tanh", **RISING}
COUNT = {"kind": "l0", **RISING}
GATES: dict[str, Recipe] = {
    "relu l1": Recipe({"kind": "relu"}, L1, starts=same(5.3)),
    "relu tanh": Recipe({"kind": "relu"}, TANH, starts=same(1.4)),
    "relu lp": Recipe({"kind": "relu"}, {"kind": "lp", **TWENTIETH}, starts=same(0.56)),
    "jumprelu log": Recipe({"kind": "jumprelu"}, TANH, {"preactivation": 3e-6}, starts=same(0.5)),
    # Adam moves a threshold by the learning rate a step: in a short run it has to start where it is wanted.
    "jumprelu direct": Recipe(
        {"kind": "jumprelu", "parameterisation": "direct", "threshold": 0.5, "bandwidth": 0.5}, COUNT, starts=same(0.6)
    ),
    "jumprelu crosslayer": Recipe(
        {"kind": "jumprelu", "parameterisation": "crosslayer", "bandwidth": 1.0}, TANH, starts=same(1.3)
    ),
    "gated": Recipe({"kind": "gated"}, L1, unit_norm=True, starts=same(3.3)),
    "hard_concrete": Recipe({"kind": "hard_concrete"}, COUNT, unit_norm=True, starts=same(1.43)),
    "gated_hard_concrete": Recipe({"kind": "gated_hard_concrete"}, COUNT, unit_norm=True, starts=same(0.92)),
    "topk": Recipe({"kind": "topk"}, also=REVIVED),
    "batchtopk": Recipe({"kind": "batchtopk"}, also=REVIVED),
    "batchtopk by norm": Recipe({"kind": "batchtopk", "rank_by": "decoder_norm"}, also=REVIVED),
    "batchtopk matryoshka": Recipe(
        {"kind": "batchtopk"}, also=REVIVED | {"matryoshka": {"prefixes": [0.125, 0.25, 0.5, 1]}}
    ),
    "batchtopk zscore": Recipe({"kind": "batchtopk", "rank_by": "zscore"}, also=REVIVED),
    "custom": Recipe(
        {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.5}}, L1, starts=same(3.4)
    ),
}
