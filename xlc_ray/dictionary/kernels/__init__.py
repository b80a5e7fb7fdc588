"""The two products of which all sparse ones are made, as `torch.library` operators: the dispatcher is the registry.

    xlc::combine  out_m = Σ_{j ∈ row m} v_j · rows[index_j]     decode, and the gradients to both weights
    xlc::dots     out_j = ⟨a[row_j], b[column_j]⟩               gradient to the values

Each file holds one operator: its reference for any device (plain torch), its CPU kernel (torch's own embedding bags or
sampled products: nothing to compile), its shape for tracing, and its CUDA kernel, which is in `triton_*.py`.
Half precision accumulates in float32. No kernel uses atomics; only the reference on CUDA, which none but a machine
without Triton runs, may differ between runs. The Triton kernels have been run in Triton's interpreter and compiled for
sm_80 and sm_90. They have not been run on a GPU: there was none.
"""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
"""Triton comes with torch's CUDA builds for Linux. Without it CUDA tensors take the reference, which is slow."""

CHUNK = 2**20  # elements of a temporary that the references may make: 4 MB in float32
