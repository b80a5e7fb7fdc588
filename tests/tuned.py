"""A "fine-tuned" model for tests: another with its weights moved, by a seed."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def save_tuned(name: str, path: object, seed: int = 0, noise: float = 0.02) -> str:
    """Save the model `name`, each weight moved by a little noise, with its tokenizer; returns the path."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * torch.randn(p.shape, generator=draw)
    model.save_pretrained(str(path))
    AutoTokenizer.from_pretrained(name).save_pretrained(str(path))
    return str(path)
