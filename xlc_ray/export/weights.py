"""Tensors in files, local or at a URL: safetensors, and PyTorch's own format read as tensors only."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from xlc_ray import files
from xlc_ray.config import UserError


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, or with the suffix .pt a dict of tensors that `torch.load` reads; floats as float32."""
    plain = {name: value.detach().float() if value.is_floating_point() else value for name, value in tensors.items()}
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in plain.items()}
    if not path.endswith(".pt"):
        files.write_bytes(path, safetensors.torch.save(plain))
        return
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    files.write_bytes(path, buffer.getvalue())


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of such a file, widened. Raises UserError where it is missing or damaged."""
    try:
        if path.endswith(".pt"):
            found = torch.load(io.BytesIO(files.read_bytes(path)), map_location="cpu", weights_only=True)
        elif files.is_url(path):
            found = safetensors.torch.load(files.read_bytes(path))
        else:
            found = safetensors.torch.load_file(files.local(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: expected a dict of tensors")
    return widened(found)


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with floats in float32 at least, so that what is computed of stored halves is not rounded to halves."""
    return {
        name: value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def folders(path: str, names: set[str], file: str) -> list[str]:
    """Those of the names in a directory that are directories with such a file, as paths, sorted."""
    inner = [files.join(path, name) for name in sorted(names) if "safetensors" not in name]
    return [folder for folder in inner if files.exists(files.join(folder, file))]


def pick(tensors: Mapping[str, Tensor], path: str, *names: str) -> list[Tensor]:
    """Some tensors of a file. Raises UserError naming the first that is not there."""
    for name in names:
        if name not in tensors:
            there = sorted(tensors)
            more = ", …" if len(there) > 8 else ""
            raise UserError(f"{path}: has no tensor {name}; it has: {', '.join(there[:8])}{more}")
    return [tensors[name] for name in names]
