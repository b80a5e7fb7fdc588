"""Small training runs in float64 on random activations, for every wiring × gate, and what they leave behind."""

from __future__ import annotations

from dataclasses import replace

import torch

from xlc_ray.config import Config
from xlc_ray.dictionary import Shards, Wiring, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Learner
from xlc_ray.training.resampling import resample

ROWS, FEATURES, STEPS = 16, 10, 20  # 10 features split 5+5 and 3+3+3+1

WIRINGS = {
    "sae": wiring.sae(["resid_post.0", "resid_post.1"], 6),
    "transcoders": wiring.transcoders([0, 1], 6, skip=False),
    "skip_transcoders": wiring.transcoders([0, 1], 6, skip=True),
    "clt": wiring.clt([0, 1, 2], 6),
    "acausal": wiring.crosscoder(["resid_post.0", "resid_post.1"], 6, "acausal"),
    "weakly_causal": wiring.crosscoder(["resid_post.0", "resid_post.1"], 6, "weak"),
    "strictly_causal": wiring.crosscoder(["resid_post.0", "resid_post.1", "resid_post.2"], 6, "strict"),
    "tied_per_source": replace(wiring.clt([0, 1, 2], 6), skip=True, tied=wiring.Tying("per_source", True, True)),
    "tied_per_target": replace(wiring.clt([0, 1, 2], 6), tied=wiring.Tying("per_target", True, True)),
    "ragged_widths": Wiring({"a": 3, "b": 5, "c": 4}, (("a",), ("a", "c")), (("a", "c"), ("b",))),
}
L1 = {"sparsity": {"kind": "l1", "coefficient": 0.1, "schedule": {"kind": "constant", "warmup": 0.5}}}
TANH_ONLY = {"sparsity": {"kind": "tanh", "coefficient": 0.1}}
TANH = {**TANH_ONLY, "preactivation": 0.01}
AUXK = {"auxk": {"k": 2}}
JUMP = {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.5}
GATES = {
    "relu_l1": ({"kind": "relu"}, L1),
    "relu_per_dim": ({"kind": "relu"}, {**L1, **AUXK, "scale": "per_dim"}),
    "jumprelu_log": (JUMP, TANH),
    "jumprelu_direct": ({**JUMP, "parameterisation": "direct"}, {"sparsity": {"kind": "l0", "coefficient": 0.1}}),
    "jumprelu_target": (JUMP, {"sparsity": {"kind": "l0", "coefficient": 0.5, "target_l0": 3.0}}),
    "topk_group": ({"kind": "topk", "k": 2, "pool": "group"}, AUXK),
    "topk_all": ({"kind": "topk", "k": 3, "rank_by": "decoder_norm"}, AUXK),
    "batchtopk_group": ({"kind": "batchtopk", "k": 2, "pool": "group", "threshold_start": 5}, AUXK),
    "batchtopk_all": ({"kind": "batchtopk", "k": 3, "threshold_start": 5}, {**AUXK, **TANH, "preactivation": 0.0}),
}
CASES = [(w, g) for w in WIRINGS for g in GATES]
GATES |= {
    "jumprelu_ghost": ({**JUMP, "threshold": 2.0}, {"ghost": {}}),
    "topk_resampled": ({"kind": "topk", "k": 1, "rank_by": "decoder_norm"}, {}),
    "jumprelu_resampled": ({**JUMP, "threshold": 2.0}, TANH),
}
CASES += [(w, g) for w in ("skip_transcoders", "clt", "tied_per_source") for g in list(GATES)[-3:]]
RESAMPLE = {"every": 5, "tokens": 2 * ROWS, "warmup": 3, "scale": 0.9}
CONCRETE = {"beta": 0.6, "final_beta": 0.4}
L0 = {"sparsity": {"kind": "l0", "coefficient": 0.1}}
LP = {"sparsity": {"kind": "lp", "coefficient": 0.1, "p_end": 0.5}}
NESTED = {"matryoshka": {"prefixes": [0.2, 0.7, 1.0]}}
MORE_GATES = {
    "gated": ({"kind": "gated"}, L1),
    "gated_per_dim": ({"kind": "gated"}, {**LP, **NESTED, "scale": "per_dim"}),
    "hard_concrete": ({"kind": "hard_concrete", **CONCRETE}, L0),
    "hard_concrete_free": ({"kind": "hard_concrete", "input_dependent": False, **CONCRETE}, L0),
    "hard_concrete_target": (
        {"kind": "hard_concrete", **CONCRETE},
        {"sparsity": {"kind": "l0", "coefficient": 0.5, "target_l0": 3.0}},
    ),
    "gated_hard_concrete": ({"kind": "gated_hard_concrete", **CONCRETE}, L0),
    "jumprelu_crosslayer": ({**JUMP, "parameterisation": "crosslayer"}, TANH),
    "relu_lp": ({"kind": "relu"}, {**LP, **AUXK}),
    "batchtopk_nested": ({"kind": "batchtopk", "k": 3}, {**NESTED, **AUXK}),
    "topk_zscore": ({"kind": "topk", "k": 3, "rank_by": "zscore"}, AUXK),
    "batchtopk_zscore": ({"kind": "batchtopk", "k": 2, "pool": "group", "rank_by": "zscore"}, TANH_ONLY),
    "custom": (
        {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.3}},
        {**L1, **AUXK},
    ),
}
SETS = {
    "fast": CASES + [("clt", g) for g in MORE_GATES],
    "rest": [(w, g) for w in WIRINGS for g in MORE_GATES if w != "clt"],
}
"""Cases by when they are run: `rest` is slow."""


def config(gate: dict, loss: dict, **changes) -> Config:
    tree = {
        "out": "unused",
        "model": {"name": "unused"},
        "text": {"dataset": "unused"},
        "generate": {"tokens": 1, "held_out_tokens": 1},
        "source": {"path": "unused"},
        "dictionary": {"wiring": {"kind": "clt"}, "features": FEATURES, "gate": gate, "decoder_norm": 0.7},
        "train": {
            "steps": STEPS,
            "batch_tokens": ROWS,
            "lr": 0.01,
            "precision": "float64",
            "clip_norm": 0.5,
            "dead_after_tokens": 3 * ROWS,
            "loss": loss,
        },
    }
    return Config.model_validate(tree).override(changes)


def batches(wires: Wiring) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shape = {site: (ROWS, width) for site, width in wires.widths.items()}
    return [
        {site: torch.randn(s, generator=generator, dtype=torch.float64) for site, s in shape.items()}
        for _ in range(STEPS)
    ]


def run(case: tuple[str, str], shards: Shards, **changes) -> dict[str, torch.Tensor]:
    """Metrics of every step, gradients of the first, parameters and counters at the end. Sharded ones: this rank's."""
    wires, (gate, loss) = WIRINGS[case[0]], (GATES | MORE_GATES)[case[1]]
    if case[1].endswith("resampled"):
        changes |= {"train.resample": RESAMPLE, "train.dead_after_tokens": ROWS}
    settings = config(gate, loss, **changes)
    dictionary = build(settings.dictionary, wires, seed=3, shards=shards)
    learner = Learner(dictionary, settings)
    found: dict[str, torch.Tensor] = {}
    share = ROWS // shards.replicas
    for i, batch in enumerate(batches(wires)):
        mine = {s: v[shards.replica * share : (shards.replica + 1) * share] for s, v in batch.items()}
        metrics = learner.train_step(mine, measure=i in (0, STEPS - 1)) or {}
        if "train.resample" in changes and learner.step % RESAMPLE["every"] == 0:
            metrics["resampled"] = resample(learner, lambda i=i: iter(batches(wires)[i : i + 2]))
        if shards.replicas > 1:  # variance about a replica's own mean is another number
            metrics.pop("explained_variance", None)
        found |= {f"metrics.{i}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()}
        if i == 0:
            found |= {f"grad.{k}": p.grad.clone() for k, p in dictionary.named_parameters() if p.requires_grad}
    found |= {f"final.{k}": v.clone() for k, v in dictionary.state_dict().items() if k != "gate.smallest_kept"}
    return found | {f"silent.{g}": s for g, s in enumerate(learner.silent)}


def sharded_size(name: str, case: tuple[str, str]) -> bool:
    kind, _, rest = name.partition(".")
    whole = ("gate.inference_threshold", "gate.smallest_kept")
    return kind == "silent" or (
        kind in ("grad", "final") and rest.startswith(("groups.", "gate.")) and not rest.startswith(whole)
    )
