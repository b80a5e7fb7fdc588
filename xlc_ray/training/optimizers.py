"""Adam and AdamW: torch's fused ones, or, with 8-bit moments, torchao's (blocks of 256 with a scale each, after
Dettmers et al. 2021, arXiv 2110.02861).

A checkpoint holds moments in float32, whatever they are in memory. Quantising again what was read from 8 bits may move
a block's scale a little, so saving does it too: a resumed run still equals one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xlc_ray.config import UserError
from xlc_ray.config.training import Optimizer, Train

MOMENTS = ("exp_avg", "exp_avg_sq")


def make(train: Train, parameters: Iterable[Tensor]) -> Any:
    """The optimizer of the settings (typed as Any: torch declares no `grad_scale`, which its own GradScaler sets)."""
    settings, options = train.optimizer, {"lr": train.lr, "betas": train.optimizer.betas, "eps": train.optimizer.eps}
    if settings.states == "float32":
        kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
        return kind(parameters, weight_decay=settings.weight_decay, fused=True, **options)
    kind = _eight_bits(settings)
    return kind(parameters, weight_decay=settings.weight_decay, **options)


def _eight_bits(settings: Optimizer) -> Any:
    try:
        from torchao import optim
    except ImportError:
        raise UserError(
            "train.optimizer.states: int8 needs the package torchao; pip install -e '.[lowbit]' or set it to float32"
        ) from None
    return optim.AdamW8bit if settings.kind == "adamw" else optim.Adam8bit


def step(optimizer: Any, lr: float, gradients: list[Tensor], shrink: float | None) -> None:
    """One step with gradients divided by `shrink`, if given."""
    fused = _fused(optimizer)
    if fused:  # divides each gradient as it reads it: clipping takes no pass of its own
        optimizer.grad_scale = None if shrink is None else torch.tensor(shrink, device=gradients[0].device)
    elif shrink is not None:
        torch._foreach_div_(gradients, shrink)
    for options in optimizer.param_groups:
        if fused:
            options["lr"] = lr
        else:
            options["lr"].fill_(lr)
    with _uncompiled(fused, gradients[0].device):
        optimizer.step()


def _uncompiled(fused: bool, device: torch.device) -> AbstractContextManager[Any]:
    # torchao compiles its step, which on a CPU takes a C++ compiler and half a minute.
    eager = not fused and device.type == "cpu"
    return torch.compiler.set_stance("force_eager") if eager else nullcontext()


def _fused(optimizer: Any) -> bool:
    return optimizer.defaults.get("fused", False)


def moments(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """What the optimizer holds of a parameter, made first if it is not there: `step`, and MOMENTS in float."""
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), device=p.device if _fused(optimizer) else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(p.data) if _fused(optimizer) else optimizer._new_buffer(p, key == "exp_avg")
    found = {"step": state["step"]}
    for key in MOMENTS:
        value = state[key]
        found[key] = value if type(value) is Tensor else value.dequantize()
    return found


@torch.no_grad()
def put(optimizer: Any, p: Tensor, found: dict[str, Tensor]) -> None:
    """Take over what `moments` gave, as it is now; nothing where the optimizer holds these very tensors."""
    for key, value in found.items():
        if optimizer.state[p][key] is not value:
            optimizer.state[p][key].copy_(value)
