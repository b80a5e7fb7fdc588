"""CUDA kernel of xlc::combine: one program a sum and tile of columns, which reads its entries in order. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # columns of a program
TOGETHER = 4  # rows in flight at once, so that memory and not latency binds


@triton.jit
def kernel(
    starts,
    index,
    values,
    rows,
    out,
    pull,
    base,
    width,
    row_stride,
    base_stride,
    TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDE: tl.constexpr,
    PULLED: tl.constexpr,
):
    """out[m, columns of this tile]; WIDE: accumulate in float64 rather than float32; PULLED: + pull[m] · base[m]."""
    exact = tl.float64 if WIDE else tl.float32
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    first = tl.load(starts + m)
    last = tl.load(starts + m + 1)
    total = tl.zeros([TILE], exact)
    if PULLED:
        start = tl.load(base + m * base_stride + column, mask=inside, other=0.0).to(exact)
        total += tl.load(pull + m).to(exact) * start
    for lo in range(first, last, TOGETHER):
        entry = lo + tl.arange(0, TOGETHER)
        here = entry < last
        row = tl.load(index + entry, mask=here, other=0)
        value = tl.load(values + entry, mask=here, other=0.0).to(exact)
        block = tl.load(
            rows + row[:, None] * row_stride + column[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(value[:, None] * block.to(exact), axis=0)
    tl.store(out + m * width + column, total.to(out.dtype.element_ty), mask=inside)


def launch(
    starts: Tensor,
    index: Tensor,
    values: Tensor,
    rows: Tensor,
    out: Tensor | None = None,
    pull: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """xlc::combine of CUDA tensors (of CPU tensors in Triton's interpreter), in new memory or over `out` [M, W]."""
    sums, width = starts.shape[0] - 1, rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = rows.new_empty(sums, width) if out is None else out
    base = out if base is None else base if base.stride(1) == 1 else base.contiguous()
    tile = min(TILE, max(16, triton.next_power_of_2(width)))
    if out.numel():
        with torch.cuda.device_of(rows):
            kernel[(sums, triton.cdiv(width, tile))](
                starts.contiguous(),
                index.contiguous(),
                values.contiguous(),
                rows,
                out,
                values if pull is None else pull,  # not read without PULLED
                base,
                width,
                rows.stride(0),
                base.stride(0),
                TILE=tile,
                TOGETHER=TOGETHER,  # pyrefly: ignore[bad-argument-type]
                WIDE=rows.dtype == torch.float64,  # pyrefly: ignore[bad-argument-type]
                PULLED=pull is not None,  # pyrefly: ignore[bad-argument-type]
            )
    return out
