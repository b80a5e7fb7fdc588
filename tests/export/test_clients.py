"""What we write, in the programs that it is written for: their own loaders and encoders, offline, within 1e-5.

The clients go into a directory of their own, without what they depend on where our environment has it: each module that
is asked for is imported in a process of its own. Only the installation needs a package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export import make
from xlc_ray.export import formats

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PACKAGES = [
    *("circuit-tracer==0.5.0", "sae-lens==6.54.12", "dictionary-learning==0.1.0", "transformer-lens==3.9.0"),
    *("einops", "babe", "nltk", "simple-parsing", "docstring-parser", "plotly", "plotly-express", "tenacity"),
    *("python-dotenv", "fancy-einsum", "typeguard", "better-abc"),
]
CASES = [
    *(("circuit_tracer", w, g) for w in ("clt", "transcoder", "skip") for g in ("relu", "jumprelu", "batchtopk")),
    *(("saelens", "sae", gate) for gate in ("relu", "jumprelu", "batchtopk", "topk", "gated")),
    *(("saelens", wired, gate) for wired in ("transcoder", "skip") for gate in ("relu", "batchtopk")),
    ("saelens", "sae_skip", "relu"),
    *(("dictionary_learning", "sae", gate) for gate in ("relu", "jumprelu", "batchtopk", "topk", "gated")),
]


@pytest.fixture(scope="module")
def clients(tmp_path_factory) -> str:
    """A directory with the clients, for PYTHONPATH. XLC_CLIENTS names one that is there already."""
    if known := os.environ.get("XLC_CLIENTS"):
        return known
    path = str(tmp_path_factory.mktemp("clients"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", path, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


def test_activations_in_the_real_clients_are_ours(tmp_path, clients):
    wanted = {}
    for form, wired, gate in CASES:
        dictionary, batch = make.trained(wired, gate)
        out = tmp_path / f"{form}-{wired}-{gate}"
        made = formats.WRITERS[form](dictionary, make.config(wired, gate), str(out))
        rows = torch.stack([batch[site] for site in dictionary.wiring.read_sites]).float()
        save_file({"x": rows}, out / "rows.safetensors")
        outputs = dictionary.reconstruct(batch)
        scaled = (form, gate) == ("dictionary_learning", "relu")  # unit columns: features times decoder norms
        features = make.codes(made if scaled else dictionary, batch)
        wanted[out.name] = features, [outputs[site] for site in dictionary.wiring.written_sites]
    command = [sys.executable, str(HERE / "clients.py"), str(tmp_path)]
    offline = os.environ | {"PYTHONPATH": clients, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (features, outputs) in wanted.items():
        found = load_file(tmp_path / name / "found.safetensors")
        for n, (f, y) in enumerate(zip(features, outputs, strict=True)):
            assert 0 < (f != 0).sum() < f.numel()
            make.alike(found["features"][n], f)
            make.alike(found["outputs"][n], y)
