"""Which losses a gate can be trained with."""

from __future__ import annotations

from xlc_ray.config.dictionary import BatchTopKGate, CustomGate, Gate, TopKGate
from xlc_ray.config.losses import Loss

COUNTED = ("jumprelu", "hard_concrete", "gated_hard_concrete")
"""Gates whose number of active features has a gradient."""
CONCRETE = ("hard_concrete", "gated_hard_concrete")
OF_PRE = ("relu", "jumprelu", "topk", "batchtopk", "custom")
"""Gates whose dead features can be revived as ReLU(pre) or exp(pre)."""


def check_gate(gate: Gate, loss: Loss) -> None:
    """Raises ValueError, one line, where gate and losses do not go together. A gate of the user's own knows itself."""
    if (s := loss.sparsity) is not None:
        counted = gate.kind in COUNTED or isinstance(gate, CustomGate)
        if s.kind == "l0" and not counted:
            raise ValueError(
                f"train.loss.sparsity.kind: l0 needs the gate {_either(COUNTED)}, not {gate.kind}; use l1, tanh or lp"
            )
        if s.kind != "l0" and gate.kind in CONCRETE:
            raise ValueError(f"train.loss.sparsity.kind: the gate {gate.kind} is penalised by l0, not by {s.kind}")
        if s.kind == "lp" and gate.kind == "jumprelu":
            raise ValueError(
                "train.loss.sparsity.kind: lp is infinitely steep at 0, where the threshold of jumprelu learns from "
                "features that are not active; use l0, tanh or l1"
            )
        if s.target_l0 and s.kind != "l0":
            raise ValueError("train.loss.sparsity.target_l0: only with kind l0")
        if s.kind in ("l1", "lp") and isinstance(gate, TopKGate | BatchTopKGate) and gate.rank_by == "zscore":
            raise ValueError(
                f"train.loss.sparsity.kind: {s.kind} needs features that are not negative, which "
                "dictionary.gate.rank_by: zscore gives; use tanh or none"
            )
    for name in ("auxk", "ghost"):
        if getattr(loss, name) and gate.kind not in OF_PRE:
            raise ValueError(f"train.loss.{name}: needs the gate {_either(OF_PRE)}, not {gate.kind}")
    if loss.preactivation and gate.kind in CONCRETE:
        raise ValueError(f"train.loss.preactivation: the gate {gate.kind} has no threshold for it")


def _either(kinds: tuple[str, ...]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"
