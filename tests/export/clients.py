"""Run with the clients on the path: load every export below a directory by its program's own loader, and encode rows.

`FORMAT-…/rows.safetensors` {x [S, B, d]} → `found.safetensors` {features [G, B, F], outputs [T, B, d]}.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file


def circuit_tracer(path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    facts = yaml.safe_load((path / "config.yaml").read_text())
    hooks = {key: facts[key] for key in ("feature_input_hook", "feature_output_hook", "scan")}
    if facts["model_kind"] == "cross_layer_transcoder":
        clt = load_clt(str(path), dtype=torch.float32, **hooks)
        features = clt.encode(x)
        return features, clt.decode(features)
    paths = {n: str(path / f"layer_{n}.safetensors") for n in range(len(list(path.glob("layer_*.safetensors"))))}
    together = load_transcoder_set(paths, dtype=torch.float32, **hooks)
    features = together.encode(x)
    return features, together.decode(features, x)


def saelens(path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sae_lens import SAE

    single = (path / "cfg.json").exists()
    folders = [path] if single else [path / f"mlp_in.{n}" for n in range(len(x))]
    saes = [SAE.load_from_disk(folder) for folder in folders]
    both = [(sae.encode(rows), sae(rows)) for sae, rows in zip(saes, x, strict=True)]
    return torch.stack([f for f, _ in both]), torch.stack([y for _, y in both])


def dictionary_learning(path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(path), device="cpu")
    features = dictionary.encode(x[0])
    return features.unsqueeze(0), dictionary.decode(features).unsqueeze(0)


@torch.no_grad()
def main(base: Path) -> None:
    for path in sorted(p for p in base.iterdir() if (p / "rows.safetensors").exists()):
        load = globals()[path.name.split("-")[0]]
        features, outputs = load(path, load_file(path / "rows.safetensors")["x"])
        found = {"features": features, "outputs": outputs}
        save_file({name: value.contiguous() for name, value in found.items()}, path / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
