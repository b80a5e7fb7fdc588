"""xlc::dots: entries of a product of two matrices.   out_j = ⟨a[row_j], b[column_j]⟩

Shapes: n entries, a [B, W], b [F, W]. With a = ∂loss/∂ŷ and b = W_dec this is the gradient to the active features.
"""

# Annotations are not postponed here: torch.library reads the types, also through the wrappers of the test run.

import warnings

import torch
from torch import Tensor

from xlc_ray.dictionary.kernels import CHUNK, HAS_TRITON

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@torch.library.custom_op("xlc::dots", mutates_args=())
def dots(a: Tensor, b: Tensor, starts: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[n] from `row`, `column` [n] (int64, by row; `starts` [B+1]: where each row's entries begin). No derivative."""
    return reference(a, b, row, column)


def reference(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """What `dots` means, in plain torch; no temporary of more than CHUNK elements."""
    exact = torch.promote_types(a.dtype, torch.float32)
    out = torch.empty(row.shape[0], dtype=exact, device=a.device)
    step = max(1, CHUNK // max(1, a.shape[1]))
    for lo in range(0, row.shape[0], step):
        here = slice(lo, lo + step)
        out[here] = (a[row[here]].to(exact) * b[column[here]]).sum(1)
    return out.to(a.dtype)


@dots.register_kernel("cpu")
def _cpu(a: Tensor, b: Tensor, starts: Tensor, row: Tensor, column: Tensor) -> Tensor:
    if not torch.backends.mkl.is_available() or a.dtype not in (torch.float32, torch.float64):
        return reference(a, b, row, column)
    pattern = torch.sparse_csr_tensor(
        starts, column, a.new_zeros(row.shape[0]), (a.shape[0], b.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, a.detach(), b.detach().T, beta=0.0).values()


@dots.register_kernel("cuda")
def _cuda(a: Tensor, b: Tensor, starts: Tensor, row: Tensor, column: Tensor) -> Tensor:
    if not HAS_TRITON:
        return reference(a, b, row, column)
    from xlc_ray.dictionary.kernels import triton_dots  # imports Triton, which other machines need not have

    return triton_dots.launch(a, b, row, column)


@dots.register_fake
def _shape(a: Tensor, b: Tensor, starts: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return a.new_empty(row.shape[0])
