"""Memory of gradients, used again by the next step.

A CPU's C library hands large freed blocks back to the kernel, and paging fresh gigabytes in takes longer than computing
the gradient that fills them. (On GPUs torch keeps freed memory by itself.) So a backward that can write into given
memory asks for that of the last step, and only gradients made in this way are kept for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_memory(weight: Tensor) -> Tensor:
    """Memory for a gradient of a weight, with anything in it: once a step the last one's, if that is still there."""
    vars(weight)["keeps_gradient"] = weight.device.type == "cpu"
    spare = vars(weight).pop("spare", None)
    return torch.empty_like(weight, memory_format=torch.contiguous_format) if spare is None else spare


def forget_gradients(parameters: Iterable[Tensor]) -> None:
    """Set gradients to None, as `zero_grad`, but leave their memory where `gradient_memory` finds it."""
    for p in parameters:
        kept = vars(p).pop("keeps_gradient", False) and p.grad is not None and p.grad.is_contiguous()
        vars(p)["spare"], p.grad = (p.grad if kept else None), None
