"""Sites side by side in one matrix: taking columns out of it, splitting it, and adding into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xlc_ray.dictionary.wiring import Spans


def join(activations: Mapping[str, Tensor], sites: tuple[str, ...], like: Tensor) -> Tensor:
    """Some sites [B, d] side by side, in the dtype of `like`."""
    return torch.cat([activations[s].to(like.dtype) for s in sites], dim=1)


def columns(x: Tensor, spans: Spans) -> Tensor:
    """Some columns of x [B, width] side by side: a view where they are one span."""
    return x[:, spans[0]] if len(spans) == 1 else torch.cat([x[:, s] for s in spans], dim=1)


def split(y: Tensor, parts: Sequence[Spans]) -> Sequence[Tensor]:
    """y [B, width] in parts, which together are all its columns, in order: views where each is one span."""
    if all(len(spans) == 1 for spans in parts):  # one backward for all of them
        return y.split([spans[0].stop - spans[0].start for spans in parts], dim=1)
    return [columns(y, spans) for spans in parts]


class AddColumns(torch.autograd.Function):
    """Sum of parts, each in its own columns of a [B, width] matrix. Backward only slices: nothing is copied."""

    @staticmethod
    def forward(ctx, width, spans, *parts):
        ctx.spans = spans
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        out = torch.zeros(parts[0].shape[0], width, dtype=dtype, device=parts[0].device)
        for own, part in zip(spans, parts, strict=True):
            start = 0
            for span in own:
                size = span.stop - span.start
                out[:, span] += part[:, start : start + size]
                start += size
        ctx.dtypes = [p.dtype for p in parts]
        return out

    @staticmethod
    def backward(ctx, grad):
        parts = (columns(grad, own).to(dtype) for own, dtype in zip(ctx.spans, ctx.dtypes, strict=True))
        return None, None, *parts
