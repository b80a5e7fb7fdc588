"""CUDA kernel of xlc::dots: one program a few entries, which walks over the columns. Entries come by row, so that their
rows of `a` are read from cache but once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # columns at once
TOGETHER = 4  # entries of a program


@triton.jit
def kernel(
    a,
    b,
    row,
    column,
    out,
    entries,
    width,
    a_stride,
    b_stride,
    TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[a few entries]; WIDE: accumulate in float64 rather than float32."""
    exact = tl.float64 if WIDE else tl.float32
    entry = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    here = entry < entries
    of_a = tl.load(row + entry, mask=here, other=0)[:, None] * a_stride
    of_b = tl.load(column + entry, mask=here, other=0)[:, None] * b_stride
    total = tl.zeros([TOGETHER, TILE], exact)
    for lo in range(0, width, TILE):
        at = lo + tl.arange(0, TILE)[None, :]
        mask = here[:, None] & (at < width)
        total += tl.load(a + of_a + at, mask=mask, other=0.0).to(exact) * tl.load(
            b + of_b + at, mask=mask, other=0.0
        ).to(exact)
    tl.store(out + entry, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=here)


def launch(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """xlc::dots of CUDA tensors (of CPU tensors in Triton's interpreter)."""
    a, b = (m if m.stride(1) == 1 else m.contiguous() for m in (a, b))
    entries, width = row.shape[0], a.shape[1]
    out = a.new_empty(entries)
    if entries:
        with torch.cuda.device_of(a):
            kernel[(triton.cdiv(entries, TOGETHER),)](
                a,
                b,
                row.contiguous(),
                column.contiguous(),
                out,
                entries,
                width,
                a.stride(0),
                b.stride(0),
                TILE=min(TILE, max(16, triton.next_power_of_2(width))),
                TOGETHER=TOGETHER,  # pyrefly: ignore[bad-argument-type]
                WIDE=a.dtype == torch.float64,  # pyrefly: ignore[bad-argument-type]
            )
    return out
