"""Files of transcoder_circuits, made as that program makes them, against its equations written out."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

import xlc_ray as xlc
from tests.export.make import alike, codes
from xlc_ray.config import UserError
from xlc_ray.export import formats

WIDTH, OUT, FEATURES = 5, 4, 9


class Config:
    """Pickled as a class of that program's, which is not there when the file is read."""

    __module__, __qualname__ = "sae_training.config", "LanguageModelSAERunnerConfig"

    def __init__(self, **settings: object) -> None:
        self.__dict__.update(settings)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save(
    path: Path, name: str, monkeypatch, transcoder: bool = True, layer: int = 8, half: bool = False, **extra
) -> dict:
    out = OUT if transcoder else WIDTH
    shapes = {"W_enc": (WIDTH, FEATURES), "b_enc": (FEATURES,), "W_dec": (FEATURES, out), "b_dec": (WIDTH,)}
    shapes |= {"b_dec_out": (out,)} if transcoder else {}
    tensors = {key: draw(*shape, seed=layer + n) for n, (key, shape) in enumerate(shapes.items())}
    tensors = {key: value.bfloat16() if half else value for key, value in tensors.items()}
    facts = {
        "hook_point": f"blocks.{layer}.ln2.hook_normalized" if transcoder else f"blocks.{layer}.hook_resid_pre",
        "out_hook_point": f"blocks.{layer}.hook_mlp_out" if transcoder else None,
        "hook_point_layer": layer,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        **extra,
    }
    path.mkdir(exist_ok=True)
    with monkeypatch.context() as there:
        module = types.ModuleType("sae_training.config")
        module.LanguageModelSAERunnerConfig = Config
        there.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
        there.setitem(sys.modules, "sae_training.config", module)
        state = torch.nn.ParameterDict(tensors).state_dict()
        torch.save({"cfg": Config(**facts), "state_dict": state}, path / name)
    return {key: value.double() for key, value in tensors.items()}


def by_hand(tensors: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    f = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    return f, f @ tensors["W_dec"] + tensors.get("b_dec_out", tensors["b_dec"])


NAME = "final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_9.pt"


@pytest.mark.parametrize(("transcoder", "half"), [(True, False), (False, False), (True, True)])
def test_a_file_computes_what_that_program_does(tmp_path, monkeypatch, transcoder, half):
    tensors = save(tmp_path, NAME, monkeypatch, transcoder, half=half)
    save(tmp_path, NAME.replace("final_", "100_"), monkeypatch, transcoder)  # an earlier checkpoint of the same run
    torch.save(torch.zeros(FEATURES), tmp_path / NAME.replace(".pt", "_log_feature_sparsity.pt"))
    assert formats.detect(str(tmp_path)) == "transcoder_circuits"
    loaded, x = xlc.load(str(tmp_path)), draw(30, WIDTH, seed=99)
    reads, writes = ("blocks.8.ln2.hook_normalized", "mlp_out.8") if transcoder else ("resid_pre.8", "resid_pre.8")
    assert (loaded.wiring.reads, loaded.wiring.writes) == (((reads,),), ((writes,),))
    f, y = by_hand(tensors, x.double())
    assert 0 < (f > 0).sum() < f.numel()
    alike(codes(loaded, {reads: x})[0], f)
    alike(loaded.reconstruct({reads: x})[writes], y)


def test_files_of_several_layers_are_groups_in_the_order_of_layers(tmp_path, monkeypatch):
    for layer in (10, 9):
        save(tmp_path, f"sparse_autoencoder_gpt2_{layer}.pt", monkeypatch, layer=layer)
    loaded = xlc.load(str(tmp_path))
    assert loaded.wiring.writes == (("mlp_out.9",), ("mlp_out.10",))
    save(tmp_path, "sparse_autoencoder_again.pt", monkeypatch, layer=9)
    with pytest.raises(UserError, match="several files write the same site"):
        xlc.load(str(tmp_path))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_runs_no_code_of_its_own(tmp_path, monkeypatch):
    save(tmp_path / "x", NAME, monkeypatch, prompt=Touch(tmp_path / "made"))
    with pytest.raises(UserError, match=r"cannot be read: it names \w+\.mkdir, which no file of transcoder_circuits"):
        xlc.load(str(tmp_path / "x"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04"])
def test_damage_is_named(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"final_.*\.pt: "):
        xlc.load(str(tmp_path))


def test_a_file_of_another_program_is_named(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / NAME)
    with pytest.raises(UserError, match="expected cfg and state_dict"):
        xlc.load(str(tmp_path))
