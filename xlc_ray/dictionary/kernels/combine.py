"""xlc::combine: weighted sums of rows.   out_m = Σ_{starts_m ≤ j < starts_{m+1}} v_j · rows[index_j]

Shapes: n entries, M sums, N rows of width W. With entries by token this is f W_dec; by feature, fᵀ g and (∂f)ᵀ x.
"""

# Annotations are not postponed here: torch.library reads the types, also through the wrappers of the test run.

import torch
import torch.nn.functional as nnf
from torch import Tensor

from xlc_ray.dictionary.kernels import CHUNK, HAS_TRITON


@torch.library.custom_op("xlc::combine", mutates_args=())
def combine(starts: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """[M, W] from `starts` [M+1], `index` [n] (int64), `values` [n] and `rows` [N, W] (of one dtype). No derivative."""
    return reference(starts, index, values, rows)


def reference(starts: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """What `combine` means, in plain torch; no temporary of more than CHUNK elements besides the result."""
    sums, entries, width = starts.shape[0] - 1, index.shape[0], rows.shape[1]
    exact = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(sums, width, dtype=exact, device=rows.device)
    owner = torch.repeat_interleave(starts.diff(), output_size=entries)
    step = max(1, CHUNK // max(1, width))
    for lo in range(0, entries, step):
        here = slice(lo, lo + step)
        out.index_add_(0, owner[here], values[here, None].to(exact) * rows[index[here]])
    return out.to(rows.dtype)


@combine.register_kernel("cpu")
def _cpu(starts: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    # An embedding bag is this very sum. CSR products (MKL) took 1 to 2 times as long on rows of up to 2048, 0.85 to
    # 1.05 times on wider ones; this needs no MKL, knows half precision, and allocates its result once, not twice.
    return nnf.embedding_bag(
        index, rows.detach(), starts, mode="sum", per_sample_weights=values.detach(), include_last_offset=True
    )


@combine.register_kernel("cuda")
def _cuda(starts: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    if not HAS_TRITON:
        return reference(starts, index, values, rows)
    from xlc_ray.dictionary.kernels import triton_combine  # imports Triton, which other machines need not have

    return triton_combine.launch(starts, index, values, rows)


@combine.register_fake
def _shape(starts: Tensor, index: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(starts.shape[0] - 1, rows.shape[1])


@torch.library.custom_op("xlc::combine_into", mutates_args=("out",))
def combine_into(
    out: Tensor,
    starts: Tensor,
    index: Tensor,
    values: Tensor,
    rows: Tensor,
    pull: Tensor | None,
    base: Tensor | None,
) -> None:
    """`combine` (+ pull_m · base_m, `pull` [M], `base` [M, W]) written over `out` [M, W], whatever that holds
    (contiguous)."""
    out.copy_(_plus(reference(starts, index, values, rows), pull, base))


def _plus(sums: Tensor, pull: Tensor | None, base: Tensor | None) -> Tensor:
    return sums if pull is None or base is None else sums.addcmul_(pull.unsqueeze(1), base)


@combine_into.register_kernel("cuda")
def _into_cuda(
    out: Tensor,
    starts: Tensor,
    index: Tensor,
    values: Tensor,
    rows: Tensor,
    pull: Tensor | None,
    base: Tensor | None,
) -> None:
    if not HAS_TRITON:
        out.copy_(_plus(reference(starts, index, values, rows), pull, base))
        return
    from xlc_ray.dictionary.kernels import triton_combine

    triton_combine.launch(starts, index, values, rows, out, pull, base)


@combine_into.register_kernel("cpu")
def _into_cpu(
    out: Tensor,
    starts: Tensor,
    index: Tensor,
    values: Tensor,
    rows: Tensor,
    pull: Tensor | None,
    base: Tensor | None,
) -> None:
    exact = rows.dtype in (torch.float32, torch.float64)
    if not exact or not index.numel() or not torch.backends.mkl.is_available():
        out.copy_(_plus(combine(starts, index, values, rows), pull, base))
        return
    # In memory that is there already MKL is two to five times faster than an embedding bag in memory of its own.
    shape = (starts.shape[0] - 1, rows.shape[0])
    weights = torch.sparse_csr_tensor(starts, index, values.detach(), shape, check_invariants=False)
    if pull is not None and base is not None:
        torch.mul(base.detach(), pull.unsqueeze(1), out=out)
    out.addmm_(weights, rows.detach(), beta=float(pull is not None))
