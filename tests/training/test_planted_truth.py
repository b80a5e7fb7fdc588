"""Every gate finds the directions that activations were made of: at least 90 % of them, each to a cosine of 0.9.

Trained by the real step, 0.2 to 0.4 million tokens, twice as many features as true ones. Strengths of penalties are
those at which the l0 comes near the true one.
"""

from __future__ import annotations

import pytest
import torch

from tests.planted import Planted
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, Shards, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training.learner import Learner

RISING = {"schedule": {"kind": "constant", "warmup": 1.0}}
"""Penalties with many local minima grow over the whole run, or features die before they have found a direction."""
BATCHTOPK = {"kind": "batchtopk", "k": 4, "threshold_start": 400, "threshold_decay": 0.99}
LONG = 1000
CROSSLAYER = {"kind": "jumprelu", "parameterisation": "crosslayer", "bandwidth": 1.0}
CUSTOM = {"kind": "custom", "path": "examples.own_gate:SoftThreshold", "options": {"start": 0.1}}


def penalty(kind: str, coefficient: float, **more) -> dict:
    return {"sparsity": {"kind": kind, "coefficient": coefficient} | more}


CASES = {
    "relu l1": ({"kind": "relu"}, penalty("l1", 1.0), 800),
    "relu tanh": ({"kind": "relu"}, penalty("tanh", 2.0, **RISING), LONG),
    "relu lp": ({"kind": "relu"}, penalty("lp", 0.5), LONG),
    "jumprelu log": ({"kind": "jumprelu"}, penalty("tanh", 0.7, **RISING) | {"preactivation": 3e-6}, LONG),
    "jumprelu direct": (
        {"kind": "jumprelu", "parameterisation": "direct", "bandwidth": 0.5},
        penalty("l0", 0.5),
        800,
    ),
    "jumprelu crosslayer": (CROSSLAYER, penalty("tanh", 3.0, **RISING), LONG),
    "gated": ({"kind": "gated"}, penalty("l1", 2.0), LONG),
    "hard_concrete": ({"kind": "hard_concrete"}, penalty("l0", 1.0, **RISING), LONG),
    "gated_hard_concrete": ({"kind": "gated_hard_concrete"}, penalty("l0", 1.5, **RISING), LONG),
    "topk": ({"kind": "topk", "k": 4}, {"auxk": {}}, 800),
    "batchtopk": (BATCHTOPK, {"auxk": {}}, 800),
    "batchtopk zscore": (BATCHTOPK | {"rank_by": "zscore"}, {"auxk": {}}, 1500),
    "batchtopk matryoshka": (BATCHTOPK, {"auxk": {}, "matryoshka": {"prefixes": [0.25, 0.5, 1]}}, LONG),
    "custom": (CUSTOM, penalty("l1", 1.0), 800),
}
QUICK = ("relu l1", "jumprelu direct", "batchtopk")


def learner_of(planted: Planted, kind: str, gate: dict, loss: dict, steps: int, lr: float = 6e-3) -> Learner:
    tree = {
        "out": "unused",
        "model": {"name": "unused"},
        "text": {"dataset": "unused"},
        "generate": {"tokens": 1, "held_out_tokens": 1},
        "source": {"path": "unused"},
        "dictionary": {
            "wiring": {"kind": kind},
            "features": 2 * planted.frequency.numel(),
            "gate": gate,
            "unit_norm": gate["kind"] in ("gated", "hard_concrete", "gated_hard_concrete"),
        },
        "train": {"steps": steps, "batch_tokens": 256, "lr": lr, "loss": loss, "dead_after_tokens": 20000},
    }
    config = Config.model_validate(tree)
    return Learner(build(config.dictionary, planted.wires, config.seed, Shards()), config)


def trained(planted: Planted, kind: str, gate: dict, loss: dict, steps: int) -> Dictionary:
    """A dictionary in its inference form after a short run."""
    learner = learner_of(planted, kind, gate, loss, steps)
    for step in range(steps):
        learner.train_step(planted.batch(step, 256), False)
    return learner.dictionary.eval()


def share_found(planted: Planted, dictionary: Dictionary) -> float:
    return (torch.cat(planted.cosines(dictionary)) >= 0.9).double().mean().item()


@torch.no_grad()
def l0_of(planted: Planted, dictionary: Dictionary) -> float:
    """Active features a token and group, on new tokens."""
    codes = dictionary.encode(dictionary.normalize_inputs(planted.batch(-2, 4000)))
    return sum(f.l0().double().mean().item() for f in codes) / len(codes)


def autoencoder() -> Planted:
    return Planted(wiring.sae(["resid_post.0"], 48), n=64, active=4)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_sparse_autoencoder_finds_the_true_directions(case):
    """64 in 48 dimensions, of which a token has 4. L1 opens further features weakly: it bounds size, not number."""
    planted = autoencoder()
    dictionary = trained(planted, "sae", *CASES[case])
    assert share_found(planted, dictionary) >= 0.9
    assert 2.5 < l0_of(planted, dictionary) < (16 if "l1" in str(CASES[case]) else 8)


def test_without_sparsity_there_is_no_truth():
    """So that neither the start nor the measure finds directions."""
    planted = autoencoder()
    assert share_found(planted, trained(planted, "sae", {"kind": "relu"}, {}, 300)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["jumprelu direct", "batchtopk"])
@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_transcoders_find_what_is_written_where_it_is_read(kind, case):
    """Each layer reads directions of its own and writes others; those of a CLT into all later layers too."""
    wires = wiring.transcoders([0, 1], 24, False) if kind == "transcoder" else wiring.clt([0, 1, 2], 24)
    planted = Planted(wires, n=36, active=2)
    gate, loss, steps = CASES[case]
    gate = gate | ({"k": 2 * wires.groups} if "k" in gate else {})
    dictionary = trained(planted, kind, gate, loss, steps)
    assert share_found(planted, dictionary) >= 0.9
    assert 1 < l0_of(planted, dictionary) < 4


@pytest.mark.slow
def test_free_hard_concrete_gates_prune_for_all_tokens_alike():
    """The exception: a gate that does not see the input (Louizos et al. 2017 prune weights so) leaves the same features
    open for every token: the code is linear, and no linear code has the directions of more features than dimensions."""
    planted = autoencoder()
    dictionary = trained(planted, "sae", {"kind": "hard_concrete", "input_dependent": False}, penalty("l0", 0.3), LONG)
    codes = dictionary.encode(dictionary.normalize_inputs(planted.batch(-2, 1000)))[0]
    assert set(codes.count().tolist()) == {0, 1000}
    assert share_found(planted, dictionary) < 0.3
