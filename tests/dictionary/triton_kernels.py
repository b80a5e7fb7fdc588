"""The Triton kernels against the references. test_kernels.py runs this file in a process of its own, because Triton's
interpreter must be chosen before Triton is imported; where there is a GPU, it is run there instead."""

import pytest
import torch

from xlc_ray.dictionary.kernels import combine, dots, triton_combine, triton_dots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # tokens, features, width, density
    (1, 1, 1, 1.0),
    (4, 3, 2, 0.0),
    (5, 7, 33, 0.4),  # empty rows; more entries than rows in flight, and fewer
    (3, 9, 600, 0.6),  # two tiles, the second in part
    (6, 5, 512, 1.0),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def random(*shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(
        DEVICE, dtype
    )


def entries(tokens, features, density):
    mask = torch.rand(tokens, features, generator=torch.Generator().manual_seed(0)) < density
    row, column = mask.to(DEVICE).nonzero().unbind(1)
    starts = torch.searchsorted(row.contiguous(), torch.arange(tokens + 1, device=DEVICE))
    return starts, row, column


def wide(matrix, offset=3):
    """The same matrix as columns of a wider one."""
    whole = matrix.new_full((matrix.shape[0], matrix.shape[1] + 2 * offset), float("nan"))
    whole[:, offset:-offset] = matrix
    return whole[:, offset:-offset]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, wide, lambda m: m.T.contiguous().T], ids="cst")
def test_combine(shape, dtype, layout):
    tokens, features, width, density = shape
    starts, _, column = entries(tokens, features, density)
    values, rows = random(len(column), dtype=dtype), random(features, width, dtype=dtype)
    got = triton_combine.launch(starts, column, values, layout(rows))
    want = combine.reference(starts, column, values, rows)
    torch.testing.assert_close(got, want)
    out = torch.full_like(got, float("nan"))
    assert triton_combine.launch(starts, column, values, layout(rows), out) is out
    torch.testing.assert_close(out, want)
    pull, base = random(tokens, dtype=dtype), random(tokens, width + 1, dtype=dtype)[:, 1:]
    triton_combine.launch(starts, column, values, layout(rows), out, pull, layout(base))
    exact = torch.promote_types(dtype, torch.float32)
    plain = combine.reference(starts, column, values.to(exact), rows.to(exact))
    torch.testing.assert_close(out, (plain + pull.to(exact).unsqueeze(1) * base.to(exact)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, wide, lambda m: m.T.contiguous().T], ids="cst")
def test_dots(shape, dtype, layout):
    tokens, features, width, density = shape
    _, row, column = entries(tokens, features, density)
    a, b = random(tokens, width, dtype=dtype), random(features, width, dtype=dtype)
    got = triton_dots.launch(layout(a), layout(b), row, column)
    torch.testing.assert_close(got, dots.reference(a, b, row, column))


def test_half_precision_is_summed_in_float32():
    ones, zeros = torch.ones(4096, dtype=torch.bfloat16, device=DEVICE), torch.zeros(4096, dtype=torch.int64).to(DEVICE)
    starts, row = torch.tensor([0, 4096], device=DEVICE), torch.ones(1, 16, dtype=torch.bfloat16, device=DEVICE)
    assert triton_combine.launch(starts, zeros, ones, row).tolist() == [[4096.0] * 16]  # bfloat16 would stop at 256
    long = torch.ones(1, 4096, dtype=torch.bfloat16, device=DEVICE)
    assert triton_dots.launch(long, long, zeros[:1], zeros[:1]).item() == 4096.0
