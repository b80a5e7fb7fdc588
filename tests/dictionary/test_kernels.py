"""Each operator keeps the rules of torch.library; its CPU kernel, its reference and its Triton kernel agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.dictionary import make
from xlc_ray.dictionary import kernels
from xlc_ray.dictionary.kernels import combine, dots
from xlc_ray.dictionary.sparse import Support, _decode, _encode_at

ROOT = Path(__file__).parents[2]


@st.composite
def problems(draw) -> tuple[Support, int]:
    """A support of up to 20 × 20, and a width."""
    tokens, features, width = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 70))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = torch.rand(tokens, features, generator=make.generator(draw(st.integers(0, 99)))) < density
    return make.support(mask), width


SOME = make.support(torch.tensor([[0, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool))
NONE = make.support(torch.zeros(4, 3, dtype=torch.bool))
ONE = make.support(torch.ones(1, 1, dtype=torch.bool))


def operands(support: Support, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, features' rows, tokens' rows."""
    return (
        make.random(support.entry.numel()),
        make.random(support.shape[1], width, seed=1),
        make.random(support.shape[0], width, seed=2),
    )


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from([1, 7, kernels.CHUNK]))
@example((NONE, 3), 7)
@example((ONE, 1), 1)
def test_cpu_kernels_equal_the_references(problem, chunk):
    support, width = problem
    values, by_feature, by_token = operands(support, width)
    whole = make.random(support.shape[1], width + 5)
    order, starts, token = support.by_feature
    pairs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combine, "CHUNK", chunk)
        patch.setattr(dots, "CHUNK", chunk)
        for rows in (by_feature, whole[:, 2:-3], by_feature.T.contiguous().T):
            args = (support.by_token, support.feature, values, rows)
            pairs.append((combine.combine(*args), combine.reference(*args)))
            ends = (by_token, rows)
            where = (support.token, support.feature)
            pairs.append((dots.dots(*ends, support.by_token, *where), dots.reference(*ends, *where)))
        args = (starts, token, values[order], by_token)
        pairs.append((combine.combine(*args), combine.reference(*args)))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(problems(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@example((NONE, 3), torch.float64)
def test_what_memory_held_does_not_matter(problem, dtype):
    support, width = problem
    values, _, by_token = (t.to(dtype) for t in operands(support, width))
    order, starts, token = support.by_feature
    args = (starts, token, values[order], by_token)
    out = torch.full((support.shape[1], width), float("nan"), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        combine.combine_into(out, *args, None, None)
    torch.testing.assert_close(out, combine.reference(*args))


def test_references_mean_the_dense_products():
    values, by_feature, by_token = operands(SOME, 6)
    f = SOME.dense(values)
    got = combine.reference(SOME.by_token, SOME.feature, values, by_feature)
    torch.testing.assert_close(got, f @ by_feature)
    got = dots.reference(by_token, by_feature, SOME.token, SOME.feature)
    torch.testing.assert_close(got, (by_token @ by_feature.T).flatten()[SOME.entry])


def test_without_mkl_gradients_are_the_same(monkeypatch):
    _, by_feature, by_token = operands(SOME, 6)
    args = (by_token, by_feature, SOME.by_token, SOME.token, SOME.feature)
    want = dots.dots(*args)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(dots.dots(*args), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("support", [SOME, NONE, ONE], ids=["some", "none", "one"])
def test_operators_keep_the_rules(support):
    values, by_feature, by_token = operands(support, 3)
    torch.library.opcheck(combine.combine, (support.by_token, support.feature, values, by_feature))
    torch.library.opcheck(dots.dots, (by_token, by_feature, support.by_token, support.token, support.feature))
    index = (support.by_token, support.token, support.feature, *support.by_feature)
    out = torch.full_like(by_feature, float("nan"))
    order, starts, token = support.by_feature
    torch.library.opcheck(combine.combine_into, (out, starts, token, values[order], by_token, None, None))
    values.requires_grad_()
    norms = by_feature.norm(dim=1)
    by_feature.requires_grad_()
    torch.library.opcheck(_decode, (values, by_feature, *index, None))
    torch.library.opcheck(_decode, (values, by_feature, *index, norms))
    bias = make.random(support.shape[1]).requires_grad_()
    known = values.detach()
    torch.library.opcheck(_encode_at, (by_feature, bias, by_token, known, *support.by_feature))


def test_triton_kernels():
    """In Triton's interpreter where there is no GPU: the interpreter must be chosen before Triton is imported."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/dictionary/triton_kernels.py"],
        cwd=ROOT,
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_works_without_triton():
    """Only the kernels themselves may import Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, xlc_ray\n"
        "from xlc_ray.dictionary.sparse import Support, decode\n"
        "w = torch.eye(2, requires_grad=True)\n"
        "decode(torch.ones(1), Support(torch.tensor([1]), (1, 2)), w)[0].sum().backward()\n"
        "print(w.grad.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[[0.0, 0.0], [1.0, 1.0]]", done.stderr
