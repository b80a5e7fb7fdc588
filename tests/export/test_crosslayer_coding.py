"""Checkpoints of crosslayer-coding, against its equations written out in float64."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import xlc_ray as xlc
from tests.export.make import alike, codes
from xlc_ray.config import UserError
from xlc_ray.export import formats

LAYERS, WIDTH, FEATURES = 3, 4, 5
SOURCES = {"none": lambda s, t: f"{s}->{t}", "per_source": lambda s, t: f"{s}", "per_target": lambda s, t: f"{t}"}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(tying: str, activation: str, scales: bool = False) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"encoder_module.encoders.{layer}.weight"] = draw(FEATURES, WIDTH, seed=layer)
        tensors[f"encoder_module.encoders.{layer}.bias_param"] = draw(FEATURES, seed=10 + layer)
        if scales:
            tensors[f"decoder_module.feature_scale.{layer}"] = draw(FEATURES, seed=30 + layer)
            tensors[f"decoder_module.feature_offset.{layer}"] = torch.zeros(FEATURES)
    for n, name in enumerate(sorted({SOURCES[tying](s, t) for t in range(LAYERS) for s in range(t + 1)})):
        tensors[f"decoder_module.decoders.{name}.weight"] = draw(WIDTH, FEATURES, seed=40 + n)
        tensors[f"decoder_module.decoders.{name}.bias_param"] = draw(WIDTH, seed=60 + n)
    if activation == "jumprelu":
        tensors["theta_manager.log_threshold"] = 0.3 * draw(LAYERS, FEATURES, seed=80) - 1
    return tensors


def write(path, tying="none", activation="jumprelu", scales=False, name="clt_checkpoint_20.safetensors", **facts):
    path.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint(tying, activation, scales)
    save_file(tensors, path / name)
    known = {"num_features": FEATURES, "num_layers": LAYERS, "d_model": WIDTH, "activation_fn": activation}
    known |= {"decoder_tying": tying, "normalization_method": "none"}
    (path / "cfg.json").write_text(json.dumps(known | facts))
    return {name: value.double() for name, value in tensors.items()}


def by_hand(tensors, x, tying):
    """Features of each layer and outputs of each, of normalised inputs [L, B, d], as that program computes them."""
    features = []
    for layer in range(LAYERS):
        pre = x[layer] @ tensors[f"encoder_module.encoders.{layer}.weight"].T
        pre = pre + tensors[f"encoder_module.encoders.{layer}.bias_param"]
        theta = tensors.get("theta_manager.log_threshold")
        features.append(pre.relu() if theta is None else pre * (pre > theta[layer].exp()))
    outputs = []
    for target in range(LAYERS):
        scale = tensors.get(f"decoder_module.feature_scale.{target}", torch.ones(FEATURES).double())
        keys = [f"decoder_module.decoders.{SOURCES[tying](source, target)}" for source in range(target + 1)]
        made = [(f * scale) @ tensors[f"{key}.weight"].T for f, key in zip(features, keys, strict=False)]
        biases = [tensors[f"{key}.bias_param"] for key in (keys[:1] if tying == "per_target" else keys)]
        outputs.append(sum(made) + sum(biases))
    return features, outputs


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize(
    ("tying", "scales"), [("none", False), ("per_source", True), ("per_target", True), ("per_target", False)]
)
def test_every_tying_computes_what_that_program_does(tmp_path, tying, scales, activation):
    tensors = write(tmp_path, tying, activation, scales)
    assert formats.detect(str(tmp_path)) == "crosslayer_coding"
    loaded, x = xlc.load(str(tmp_path)), draw(LAYERS, 40, WIDTH, seed=90).double()
    features, outputs = by_hand(tensors, x, tying)
    batch = {f"mlp_in.{n}": x[n].float() for n in range(LAYERS)}
    for got, want in zip(codes(loaded, batch), features, strict=True):
        assert 0 < (want != 0).sum() < want.numel()
        alike(got, want)
    for n, want in enumerate(outputs):
        alike(loaded.reconstruct(batch)[f"mlp_out.{n}"], want)


@pytest.mark.parametrize("place", ["", ".."])
def test_the_datasets_statistics_are_the_normalisation(tmp_path, place):
    tensors = write(tmp_path / "clt", normalization_method="mean_std")
    mean, std = draw(2, LAYERS, WIDTH, seed=91).double(), draw(2, LAYERS, WIDTH, seed=92).double().abs() + 0.5
    stats = {
        str(n): {
            e: {"mean": mean[i, n].tolist(), "std": std[i, n].tolist()} for i, e in enumerate(("inputs", "targets"))
        }
        for n in range(LAYERS)
    }
    (tmp_path / "clt" / place / "norm_stats.json").write_text(json.dumps(stats))
    x = draw(LAYERS, 40, WIDTH, seed=90).double()
    _, outputs = by_hand(tensors, (x - mean[0].unsqueeze(1)) / (std[0].unsqueeze(1) + 1e-6), "none")
    got = xlc.load(str(tmp_path / "clt")).reconstruct({f"mlp_in.{n}": x[n].float() for n in range(LAYERS)})
    for n, want in enumerate(outputs):
        alike(got[f"mlp_out.{n}"], want * (std[1, n] + 1e-6) + mean[1, n])


def test_of_several_checkpoints_the_latest(tmp_path):
    write(tmp_path, name="clt_checkpoint_100.safetensors")
    zeros = {name: torch.zeros_like(value) for name, value in checkpoint("none", "jumprelu").items()}
    save_file(zeros, tmp_path / "clt_checkpoint_20.safetensors")
    assert xlc.load(str(tmp_path)).groups[0].W_enc.any()
    save_file(zeros, tmp_path / "best.safetensors")
    with pytest.raises(UserError, match=r"several checkpoints \(best\.safetensors, "):
        xlc.load(str(tmp_path))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"activation_fn": "batchtopk"}, "activation_fn batchtopk depends on the other tokens.*convert_batchtopk"),
        ({"normalization_method": "mean_std"}, r"norm_stats\.json: missing, but cfg\.json says.*mean_std; copy"),
        ({"normalization_method": "sqrt_d_model"}, "sqrt_d_model is not known; allowed: none, mean_std, auto"),
        (
            {"sqrt_d_model_normalize": True},
            r"cfg\.json: sqrt_d_model_normalize, which overrides normalization_method, is not known.*allowed: false",
        ),
        ({"num_layers": "3"}, r"cfg\.json: num_layers is '3'; allowed: an integer from 1 on"),
        ({"num_layers": 0}, r"num_layers is 0; allowed: an integer from 1 on"),
        ({"d_model": None}, r"d_model is None; allowed: an integer from 1 on"),
        (
            {"decoder_tying": "per_layer"},
            "decoder_tying 'per_layer' is not known; allowed: none, per_source, per_target",
        ),
        ({"num_layers": 4}, r"has no tensor decoder_module\.decoders\.0->3\.weight"),
        ({"decoder_tying": "per_source"}, r"has no tensor decoder_module\.decoders\.0\.weight"),
        ({"d_model": 9}, r"W_enc of group 0 is \[5, 4\], but \[5, 9\]"),
    ],
)
def test_what_has_no_place_here_is_named(tmp_path, facts, message):
    write(tmp_path, **facts)
    with pytest.raises(UserError, match=message):
        xlc.load(str(tmp_path))


def test_the_older_flag_for_a_scale_may_be_off(tmp_path):
    write(tmp_path, sqrt_d_model_normalize=False)
    assert (xlc.load(str(tmp_path)).read_scale == 1).all()


def test_offsets_and_skips_are_named(tmp_path):
    tensors = checkpoint("per_target", "relu", scales=True)
    write(tmp_path, "per_target", "relu")
    for key in ("decoder_module.feature_offset.1", "decoder_module.skip_weights.0"):
        save_file({**tensors, key: torch.ones(FEATURES)}, tmp_path / "clt_checkpoint_20.safetensors")
        with pytest.raises(UserError, match=f"{key}: feature offsets and skip connections"):
            xlc.load(str(tmp_path))
