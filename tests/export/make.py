"""Small trained-like dictionaries with a normalisation, and the settings that would have made them."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.dictionary import make
from xlc_ray.config import Config
from xlc_ray.dictionary import Dictionary, wiring
from xlc_ray.dictionary.build import normalize_by

WIDTH, LAYERS = 6, 3
WIRINGS = {
    "sae": wiring.sae(["resid_post.1"], WIDTH),
    "saes": wiring.sae(["resid_post.0", "resid_post.1", "resid_post.10"], WIDTH),
    "transcoder": wiring.transcoders(range(LAYERS), WIDTH, skip=False),
    "skip": wiring.transcoders(range(LAYERS), WIDTH, skip=True),
    "clt": wiring.clt(range(LAYERS), WIDTH),
    "clt_skip": replace(wiring.clt(range(LAYERS), WIDTH), skip=True),
    "sae_skip": replace(wiring.sae(["resid_post.1"], WIDTH), skip=True),
    "acausal": wiring.crosscoder([f"resid_post.{n}" for n in range(LAYERS)], WIDTH, "acausal"),
    "weak": wiring.crosscoder([f"resid_post.{n}" for n in range(LAYERS)], WIDTH, "weak"),
    "strict": wiring.crosscoder([f"resid_post.{n}" for n in range(LAYERS)], WIDTH, "strict"),
}
SETTINGS = {
    "sae": {"kind": "sae", "layers": [1]},
    "saes": {"kind": "sae"},
    "transcoder": {"kind": "transcoder"},
    "skip": {"kind": "transcoder", "skip": True},
    "clt": {"kind": "clt"},
    "clt_skip": {"kind": "clt", "skip": True},
    "sae_skip": {"kind": "custom", "path": "mine:sae_with_skip"},
    **{name: {"kind": "crosscoder", "causality": name} for name in ("acausal", "weak", "strict")},
}
GATES = {
    "relu": {"kind": "relu"},
    "jumprelu": {"kind": "jumprelu", "threshold": 0.4},
    "jumprelu_direct": {"kind": "jumprelu", "threshold": 0.4, "parameterisation": "direct"},
    "batchtopk": {"kind": "batchtopk", "k": 3, "threshold_start": 0},
    "batchtopk_by_norm": {"kind": "batchtopk", "k": 3, "threshold_start": 0, "rank_by": "decoder_norm"},
    "batchtopk_group": {"kind": "batchtopk", "k": 2, "threshold_start": 0, "pool": "group"},
    "topk_shared": {"kind": "topk", "k": 4, "threshold_start": 0},
    "gated": {"kind": "gated"},
    "topk": {"kind": "topk", "k": 2, "pool": "group"},
    "topk_by_norm": {"kind": "topk", "k": 2, "pool": "group", "rank_by": "decoder_norm"},
}


def config(wired: str, gate: str, **changes) -> Config:
    tree = {
        "out": "runs/x",
        "model": {"name": "openai-community/gpt2"},
        "text": {"dataset": "books", "context": 48},
        "generate": {"tokens": 100, "held_out_tokens": 10},
        "source": {"path": "nowhere/store"},
        "dictionary": {"wiring": SETTINGS[wired], "features": 7, "gate": GATES[gate]},
        "train": {"steps": 1, "batch_tokens": 8, "lr": 0.1},
    }
    return Config.model_validate(tree).override(changes)


def trained(wired: str, gate: str, normalization: str = "mean_std") -> tuple[Dictionary, dict[str, torch.Tensor]]:
    """A float64 dictionary in inference form with thresholds that were learned, and 50 rows in raw units."""
    wires = WIRINGS[wired]
    batch = make.activations(wires, 50)
    made = make.dictionary(wires, GATES[gate])
    settings = make.section(GATES[gate], normalization={"kind": normalization}).normalization
    normalize_by(made, settings, SETTINGS[wired]["kind"], make.statistics(batch))
    made.analyse(made.normalize_inputs(batch))
    made.gate.finish_step(1)
    return made.eval(), batch


def codes(dictionary: Dictionary, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Features [B, F] of each group, from raw rows."""
    own = {site: value.to(dictionary.b_dec.dtype) for site, value in batch.items()}
    return [f.dense().detach() for f in dictionary.encode(dictionary.normalize_inputs(own))]


def alike(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to the tolerance relative to the largest value."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def same(got: Dictionary, want: Dictionary, batch: dict[str, torch.Tensor], scaled: bool = False) -> None:
    """Equal features (`scaled`: in units of decoder norms) and reconstructions."""
    for g, (a, b) in enumerate(zip(codes(got, batch), codes(want, batch), strict=True)):
        assert 0 < (b != 0).sum() < b.numel()
        if scaled:
            assert torch.equal(a != 0, b != 0)
            norms = (a.double().sum(dim=0) / b.sum(dim=0)).nan_to_num(0)
            alike(a, b * norms)
            assert (norms[norms > 0] - norms[norms > 0].mean()).abs().max() > 0
        else:
            alike(a, b)
        assert a.shape[1] == want.sizes[g]
    made = got.reconstruct({site: value.float() for site, value in batch.items()})
    for site, value in want.reconstruct(batch).items():
        alike(made[site], value)
