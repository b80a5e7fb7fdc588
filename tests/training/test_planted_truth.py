"""Every gate finds the directions that activations were made of: at least 90 % of them, each to a cosine of 0.9.

Trained by the real step, with settings that differ from the defaults where gates.py of the benchmarks differs too.
"""

from __future__ import annotations

import pytest
import torch

from tests.planted import Planted
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards, Wiring, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training.learner import Learner

SLOW = pytest.mark.slow
RISING = {"kind": "constant", "warmup": 1.0}
BATCHTOPK = {"kind": "batchtopk", "k": 4, "threshold_start": 500, "threshold_decay": 0.99}


def penalty(kind: str, coefficient: float, **more) -> dict:
    return {"sparsity": {"kind": kind, "coefficient": coefficient} | more}


def trained(planted: Planted, gate: dict, loss: dict, features: int = 96, **train) -> tuple[Dictionary, float]:
    """A dictionary in its inference form after a short run, and its l0 on new tokens."""
    steps, rows = train.pop("steps", 1500), train.pop("batch_tokens", 256)
    tree = {
        "out": "unused",
        "model": {"name": "unused"},
        "text": {"dataset": "unused"},
        "generate": {"tokens": 1, "held_out_tokens": 1},
        "source": {"path": "unused"},
        "dictionary": {
            "wiring": {"kind": "sae"},
            "features": features,
            "gate": gate,
            "unit_norm": "gated" in gate["kind"] or "hard" in gate["kind"],
        },
        "train": {"steps": steps, "batch_tokens": rows, "lr": 3e-3, "loss": loss, "dead_after_tokens": 20000} | train,
    }
    config = Config.model_validate(tree)
    learner = Learner(build(config.dictionary, planted.wires, config.seed, Shards()), config)
    for step in range(steps):
        learner.train_step(planted.batch(step, rows), False)
    dictionary = learner.dictionary.eval()
    with torch.no_grad():
        features_of = dictionary.encode(dictionary.normalize_inputs(planted.batch(-2, 4000)))
    return dictionary, sum(f.l0().double().mean().item() for f in features_of)


def share_found(planted: Planted, dictionary: Dictionary) -> float:
    return (torch.cat(planted.cosines(dictionary)) >= 0.9).double().mean().item()


CASES = {
    "relu l1": ({"kind": "relu"}, penalty("l1", 1.0), {}),
    "relu tanh": ({"kind": "relu"}, penalty("tanh", 2.0, schedule=RISING), {}),
    "relu lp": ({"kind": "relu"}, penalty("lp", 0.5), {}),
    "jumprelu log": ({"kind": "jumprelu"}, penalty("tanh", 1.0, schedule=RISING) | {"preactivation": 3e-6}, {}),
    "jumprelu direct": (
        {"kind": "jumprelu", "parameterisation": "direct", "bandwidth": 0.5},
        penalty("l0", 0.5),
        {},
    ),
    "jumprelu crosslayer": (
        {"kind": "jumprelu", "parameterisation": "crosslayer", "bandwidth": 1.0},
        penalty("tanh", 2.0, schedule=RISING),
        {},
    ),
    "gated": ({"kind": "gated"}, penalty("l1", 2.0), {}),
    "hard_concrete": ({"kind": "hard_concrete"}, penalty("l0", 0.5), {}),
    "gated_hard_concrete": ({"kind": "gated_hard_concrete"}, penalty("l0", 0.5), {}),
    "topk": ({"kind": "topk", "k": 4}, {"auxk": {}}, {}),
    "batchtopk": (BATCHTOPK, {"auxk": {}}, {}),
    "batchtopk zscore": (BATCHTOPK | {"rank_by": "zscore"}, {"auxk": {}}, {}),
    "batchtopk matryoshka": (BATCHTOPK, {"auxk": {}, "matryoshka": {"prefixes": [0.25, 0.5, 1]}}, {}),
    "custom": (
        {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.1}},
        penalty("l1", 1.0),
        {},
    ),
}
QUICK = ("jumprelu direct", "topk", "batchtopk")


@pytest.mark.parametrize("case", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in CASES])
def test_a_sparse_autoencoder_finds_the_true_directions(case):
    """Of 64 in 32 dimensions, 4 active a token."""
    gate, loss, more = CASES[case]
    planted = Planted(wiring.sae(["resid_post.0"], 32), n=64, active=4)
    dictionary, l0 = trained(planted, gate, loss, **more)
    assert share_found(planted, dictionary) >= 0.9
    assert 2 < l0 < 12


def test_no_gate_no_truth():
    """The same data and measure, without anything that makes features sparse: cosines of 0.9 do not come by chance."""
    planted = Planted(wiring.sae(["resid_post.0"], 32), n=64, active=4)
    dictionary, _ = trained(planted, {"kind": "relu"}, {}, steps=300)
    assert share_found(planted, dictionary) < 0.2


@pytest.mark.slow
def test_free_hard_concrete_gates_find_a_subspace_and_not_directions():
    """Louizos et al. 2017, section 2: a gate that does not see the input prunes a feature for all tokens alike. What is
    left is a linear code, which cannot have more features than dimensions: it finds how many dimensions there are."""
    draw = torch.Generator().manual_seed(0)
    planted = Planted(wiring.sae(["resid_post.0"], 32), n=64, active=4)
    basis = torch.linalg.qr(torch.randn(32, 6, generator=draw))[0]
    planted.batch = ...


WIRED: dict[str, Wiring] = {
    "transcoder": wiring.transcoders([0, 1], 24, False),
    "clt": wiring.clt([0, 1, 2], 24),
}
