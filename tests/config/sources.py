"""What each preset's source says, by hand from papers and programs; their own units in comments where ours differ."""

from __future__ import annotations

import pytest

OF_ALL = {"seed": 0, "train.optimizer.betas": (0.9, 0.999), "train.loss.scale": "canonical"}
OF_SAES = {"dictionary.wiring.kind": "sae", "dictionary.tie_encoder_init": True}
L1_OF_APRIL = {
    **OF_SAES,
    "dictionary.gate.kind": "relu",
    "dictionary.normalization.kind": "mean_norm",  # E|x| = sqrt(n)
    "dictionary.decoder_norm": 0.1,
    "dictionary.bias_init": "zeros",
    "dictionary.unit_norm": False,
    "train.lr": 5e-5,
    "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 0.2, "end": 0},
    "train.clip_norm": 1,
    "train.loss.sparsity.kind": "l1",
    "train.loss.sparsity.coefficient": 5,
    "train.loss.sparsity.decoder_norm": True,
    "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 0.05},
}
EXPECTED = {
    "anthropic_clt": {
        "dictionary.wiring.kind": "clt",
        "dictionary.gate": {"kind": "jumprelu", "threshold": 0.1, "bandwidth": 2, "parameterisation": "log"},
        "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 0.2, "end": 0},
        "train.loss.sparsity.kind": "tanh",
        "train.loss.sparsity.c": 4,
        "train.loss.sparsity.coefficient": 10,
        "train.loss.sparsity.decoder_norm": True,
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 1},
        "train.loss.preactivation": 3e-6,
    },
    "anthropic_april24": L1_OF_APRIL | {"dictionary.wiring.site": "resid_post"},
    "rajamanoharan": OF_SAES
    | {
        "dictionary.gate": {"kind": "jumprelu", "threshold": 1e-3, "bandwidth": 1e-3, "parameterisation": "direct"},
        "dictionary.normalization.kind": "unit",
        "dictionary.unit_norm": True,
        "train.lr": 7e-5,
        "train.batch_tokens": 4096,
        "train.optimizer.betas": (0, 0.999),
        "train.loss.sparsity.kind": "l0",
        "train.loss.sparsity.target_l0": None,
    },
    "gao_topk": OF_SAES
    | {
        "dictionary.gate.kind": "topk",
        "dictionary.gate.k": 32,
        "dictionary.gate.rank_by": "activation",
        "dictionary.bias_init": "geometric_median",
        "dictionary.unit_norm": True,
        "train.batch_tokens": 131072,
        "train.lr": 1e-4,
        "train.lr_schedule": {"kind": "constant", "warmup": 0},
        "train.optimizer.eps": 6.25e-10,
        "train.clip_norm": None,
        "train.dead_after_tokens": 10_000_000,
        "train.loss.auxk": {"coefficient": 1 / 32, "k": None},
        "train.loss.sparsity": None,
    },
    "bussmann_batchtopk": OF_SAES
    | {
        "dictionary.wiring.site": "resid_pre",
        "dictionary.gate.kind": "batchtopk",
        "dictionary.gate.k": 32,
        "dictionary.unit_norm": True,
        "train.batch_tokens": 4096,
        "train.lr": 3e-4,
        "train.optimizer.betas": (0.9, 0.99),
        "train.dead_after_tokens": 5 * 4096,
        "train.loss.scale": "per_dim",
        "train.loss.auxk": {"coefficient": 1 / 32, "k": 512},
        "train.loss.sparsity": None,
    },
    "gated": OF_SAES
    | {
        "dictionary.gate": {"kind": "gated", "auxiliary": 1},
        "dictionary.unit_norm": True,
        "train.lr": 3e-4,
        "train.batch_tokens": 4096,
        "train.optimizer.betas": (0, 0.999),
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.decoder_norm": False,
    },
    "crosslayer_coding": {
        "dictionary.wiring.kind": "clt",
        "dictionary.wiring.tied": None,
        "dictionary.gate": {"kind": "jumprelu", "threshold": 0.03, "bandwidth": 1, "parameterisation": "crosslayer"},
        "dictionary.normalization.kind": "mean_std",
        "train.batch_tokens": 4096,
        "train.lr": 3e-4,
        "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 1, "end": 0.1},
        "train.optimizer.kind": "adamw",
        "train.optimizer.weight_decay": 0.01,
        "train.clip_norm": None,
        "train.loss.scale": "per_dim",
        "train.loss.sparsity.kind": "tanh",
        "train.loss.sparsity.c": 1,
        "train.loss.sparsity.coefficient": pytest.approx(1e-3 * 4096),  # summed over the tokens of a batch
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 1},
        "train.dead_after_tokens": 1000 * 4096,
    },
    "sae_interpretability": {
        "dictionary.wiring.kind": "sae",
        "dictionary.gate.kind": "hard_concrete",
        "dictionary.gate.input_dependent": True,
        "dictionary.gate.beta": 0.5,
        "dictionary.gate.gamma": -0.1,
        "dictionary.gate.zeta": 1.1,
        "dictionary.normalization.kind": "none",
        "dictionary.unit_norm": True,
        "train.batch_tokens": 4 * 5 * 1024,
        "train.lr": 1e-3,
        "train.lr_schedule": {"kind": "cosine", "warmup": 20_000 / 400_000, "cycles": 1, "end": 0.1},
        "train.clip_norm": 64,  # 1 on a loss divided by the width 64
        "train.loss.sparsity.kind": "l0",
        "train.loss.sparsity.coefficient": 0.1,
    },
    "transcoder_circuits": {
        "dictionary.wiring": {"kind": "transcoder", "layers": "all", "skip": False},
        "dictionary.gate.kind": "relu",
        "dictionary.unit_norm": True,
        "dictionary.tie_encoder_init": False,
        "train.batch_tokens": 4096,
        "train.lr": 4e-4,
        "train.lr_schedule": {"kind": "constant", "warmup": pytest.approx(5000 * 4096 / 60e6, rel=0.01)},
        "train.dead_after_tokens": 5000 * 4096,
        "train.loss.scale": "per_dim",
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.coefficient": pytest.approx(1.4e-4 * 768**0.5, rel=0.01),
        "train.loss.sparsity.decoder_norm": False,
        "train.loss.ghost": {"coefficient": 1},
    },
    "acausal_crosscoder": {
        "dictionary.wiring": {"kind": "crosscoder", "site": "resid_post", "layers": "all", "causality": "acausal"},
        "dictionary.gate.kind": "relu",
        "dictionary.normalization.kind": "mean_norm",
        "dictionary.decoder_norm": pytest.approx(0.005 * 12**0.5, rel=0.01),  # 0.005 a layer
        "dictionary.tie_encoder_init": True,
        "dictionary.unit_norm": False,
        "train.batch_tokens": 2048,
        "train.lr": 2e-5,
        "train.lr_schedule": {"kind": "linear", "warmup": 0.05, "decay": 0.2, "end": 0},
        "train.clip_norm": 1,
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.coefficient": pytest.approx(2 * 12**0.5, rel=0.01),  # 2 x the sum of layers' norms
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 0.05},
    },
    "sae_factory": L1_OF_APRIL
    | {
        "dictionary.wiring.site": "mlp_out",
        "train.batch_tokens": 4096,
        "train.dead_after_tokens": 1000 * 4096,
    },
}
