import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlc_ray.activations.order import Order

SHAPES = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 5), st.integers(1, 9), st.integers(1, 7)
)


def rows(order, windows):
    found = [order.window(w) for w in windows]
    return [(int(c), int(r)) for w in found for c, r in zip(w.chunk, w.row, strict=True)]


@settings(deadline=None, max_examples=80)
@given(SHAPES)
def test_every_row_exactly_once_an_epoch(shape):
    chunk_rows, *_ = shape
    order = Order(*shape)
    everything = [(c, r) for c, n in enumerate(chunk_rows) for r in range(n)]
    n = order.epoch_windows
    for epoch in (0, 1, 2):
        assert sorted(rows(order, range(epoch * n, (epoch + 1) * n))) == everything
    assert order.epoch_rows == sum(chunk_rows)


@settings(deadline=None, max_examples=80)
@given(SHAPES, st.integers(0, 400))
def test_window_at_finds_the_window_and_starts_are_consecutive(shape, position):
    order = Order(*shape)
    w = order.window_at(position)
    window = order.window(w)
    assert window.start <= position < window.start + len(window)
    assert order.window(w + 1).start == window.start + len(window)


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.permutations(range(12)))
def test_random_access_equals_sequential(shape, visits):
    sequential = [rows(Order(*shape), [w]) for w in range(12)]
    order = Order(*shape)
    for w in visits:
        assert rows(order, [w]) == sequential[w]


def test_seeds_and_epochs_differ_and_repeat():
    def epoch(seed, number):
        order = Order([64] * 8, seed, 8, 16)
        n = order.epoch_windows
        return rows(order, range(number * n, (number + 1) * n))

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(seed, number)) for seed in (1, 2) for number in (0, 1)}) == 4


def test_a_window_mixes_many_chunks_within_every_batch():
    order = Order([512] * 32, 0, 16, 256)
    window = order.window(0)
    assert len(np.unique(window.chunk)) == 32
    for start in range(0, len(window), 512):
        assert len(np.unique(window.chunk[start : start + 512])) >= 24


def test_a_window_is_contiguous_slices():
    window = Order([100, 37], 0, 16, 3).window(0)
    slices = {(int(c), int(r) // 16) for c, r in zip(window.chunk, window.row, strict=True)}
    assert len(slices) == 3


def test_state_is_numbers_not_permutations():
    order = Order([1000] * 50, 0, 10, 100)
    for w in range(5 * order.epoch_windows):
        order.window(w)
    assert len(order._epochs) <= 2


@pytest.mark.parametrize("bad", [[], [3, 0]])
def test_empty_chunks_are_a_bug(bad):
    with pytest.raises(AssertionError):
        Order(bad, 0, 8, 8)
