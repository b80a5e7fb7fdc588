"""Crosscoders of neelnanda-io/Crosscoders, against their equations written out in float64."""

from __future__ import annotations

import json

import pytest
import torch

import xlc_ray as xlc
from tests.export.make import alike, codes
from xlc_ray.config import UserError
from xlc_ray.export import formats

LAYERS, WIDTH, FEATURES = 3, 4, 9


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(path, number: int, seed: int) -> dict[str, torch.Tensor]:
    tensors = {
        "W_enc": draw(LAYERS, WIDTH, FEATURES, seed=seed),
        "W_dec": draw(FEATURES, LAYERS, WIDTH, seed=seed + 1),
        "b_enc": draw(FEATURES, seed=seed + 2),
        "b_dec": draw(LAYERS, WIDTH, seed=seed + 3),
    }
    torch.save(tensors, path / f"{number}.pt")
    (path / f"{number}_cfg.json").write_text(json.dumps({"model_name": "gpt2-small", "site": "resid_post"}))
    return tensors


def test_the_last_one_saved_computes_what_that_program_does(tmp_path):
    save(tmp_path, 2, seed=1)
    tensors = save(tmp_path, 10, seed=20)
    assert formats.detect(str(tmp_path)) == "acausal_crosscoder"
    loaded, x = xlc.load(str(tmp_path)), draw(30, LAYERS, WIDTH, seed=9)
    sites = tuple(f"resid_post.{n}" for n in range(LAYERS))
    assert loaded.wiring.reads == loaded.wiring.writes == (sites,)
    double = {key: value.double() for key, value in tensors.items()}
    f = (torch.einsum("bld,ldf->bf", x.double(), double["W_enc"]) + double["b_enc"]).relu()
    y = torch.einsum("bf,fld->bld", f, double["W_dec"]) + double["b_dec"]
    batch = {site: x[:, n] for n, site in enumerate(sites)}
    assert 0 < (f > 0).sum() < f.numel()
    alike(codes(loaded, batch)[0], f)
    for n, site in enumerate(sites):
        alike(loaded.reconstruct(batch)[site], y[:, n])


def test_weights_of_another_form_are_named(tmp_path):
    tensors = save(tmp_path, 0, seed=1)
    torch.save({**tensors, "W_enc": tensors["W_enc"][0]}, tmp_path / "0.pt")
    with pytest.raises(UserError, match=r"0\.pt: expected W_enc \[L, d, F\]"):
        xlc.load(str(tmp_path))
