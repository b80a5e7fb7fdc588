"""transcoder_circuits (Dunefsky et al. 2024), in: a transcoder or SAE of one site a file, in raw units.

*.pt    {"cfg": an object of that program's, "state_dict": W_enc [d, F], b_enc [F], W_dec [F, d_out], b_dec [d],
        b_dec_out [d_out] of transcoders}:   f = max((x - b_dec) W_enc + b_enc, 0),   ŷ = f W_dec + b_dec_out (or b_dec)

Of `cfg` only the numbers and words are read: the file may name that program's classes, which need not be there, and no
other code. Transcoders read `ln2.hook_normalized`, which TransformerLens has without the gain and bias of the LayerNorm
(they are folded into the MLP); so the site keeps that name.
"""

from __future__ import annotations

import io
import pickle
import types
import zipfile
from typing import Any

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.dictionary import Dictionary, Shards, Wiring, gates
from xlc_ray.export.names import site_of
from xlc_ray.export.plain import assemble, uncentred
from xlc_ray.export.weights import pick, widened

DENSITIES = "_log_feature_sparsity.pt"


def detect(path: str, names: set[str]) -> bool:
    """Whether a directory with these files is one of transcoder_circuits."""
    return any("sparse_autoencoder_" in name for name in _weights(names))


def read(path: str) -> Dictionary:
    """The dictionary in such a directory: a group for each file, and of one training run the final file."""
    names = _weights(set(files.listdir(path)))
    chosen = [name for name in names if name.startswith("final_")] or names
    parts = sorted((_read_one(files.join(path, name)) for name in chosen), key=lambda part: part["layer"])
    reads, writes = (tuple((part[side],) for part in parts) for side in ("read", "written"))
    if len(set(writes)) < len(parts):
        raise UserError(f"{path}: several files write the same site; leave one of them in a directory")
    widths = {part["read"]: part["weights"][0].shape[1] for part in parts}
    widths |= {part["written"]: part["weights"][2].shape[1] for part in parts}
    wiring = Wiring(widths, reads, writes)
    biases = {part["written"]: part["b_dec"] for part in parts}
    b_dec = torch.cat([biases[site] for site in wiring.written_sites])
    gate = gates.ReLU([len(part["weights"][1]) for part in parts], Shards())
    return assemble(path, wiring, [part["weights"] for part in parts], b_dec, gate)


def _weights(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".pt") and not name.endswith(DENSITIES))


def _read_one(name: str) -> dict[str, Any]:
    facts, tensors = _load(name)
    W_enc, b_enc, W_dec, b_dec = pick(tensors, name, "W_enc", "b_enc", "W_dec", "b_dec")
    transcodes = "b_dec_out" in tensors
    read = site_of(str(facts.get("hook_point")))
    return {
        "weights": (W_enc.T, uncentred(name, W_enc.T, b_enc, b_dec), W_dec),
        "b_dec": tensors["b_dec_out"] if transcodes else b_dec,
        "read": read,
        "written": site_of(str(facts.get("out_hook_point"))) if transcodes else read,
        "layer": int(facts.get("hook_point_layer") or 0),
    }


# ---------------------------------------------------------------- the pickle


class _Facts:
    """Stands for an object of that program's: its state, as it was."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes nothing but tensors, plain containers and `_Facts`."""

    _ALLOWED = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "sae_training":
            return _Facts
        found = f"{module}.{name}"
        plain = module == "torch" and (name.endswith("Storage") or name in ("device", "Size", "float32"))
        if plain or found in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {found}, which no file of transcoder_circuits needs")


def _load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors, widened, of a file. Raises UserError where it is damaged, or names other code."""
    pickled = types.SimpleNamespace(__name__="pickle", Unpickler=_Unpickler)
    raw = files.read_bytes(name)
    try:
        if not zipfile.is_zipfile(io.BytesIO(raw)):
            raise UserError(f"{name}: not a file of torch.save since PyTorch 1.6")
        found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False, pickle_module=pickled)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from None
    facts = getattr(found.get("cfg"), "state", None) if isinstance(found, dict) else None
    tensors = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(facts, dict) or not isinstance(tensors, dict):
        raise UserError(f"{name}: expected cfg and state_dict, as transcoder_circuits saves them")
    return facts, widened(tensors)
