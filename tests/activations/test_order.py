import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlc_ray.activations.order import Order

CHUNKS = st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 5), st.integers(1, 9), st.integers(1, 7)
SHAPES = st.tuples(*CHUNKS, st.none() | st.integers(1, 5))
MIXED = st.tuples(*CHUNKS, st.integers(1, 5))


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


def wanted(order, windows):
    """{(epoch, chunk): (first, last window of these that have a row of it)}"""
    found = {}
    for w in windows:
        for chunk in np.unique(order.window(w).chunk).tolist():
            key = w // order.epoch_windows, chunk
            found[key] = found.get(key, (w, w))[0], w
    return found


@settings(deadline=None, max_examples=80)
@given(MIXED, st.integers(0, 60), st.integers(0, 60))
def test_needs_are_what_the_windows_want_in_their_order(shape, start, count):
    order = Order(*shape)
    needs = list(order.needs(start, start + count))
    everything = wanted(order, range(-(-(start + count) // order.epoch_windows) * order.epoch_windows))
    assert {(need.epoch, need.chunk): (need.first, need.last) for need in needs} == {
        key: (first, last) for key, (first, last) in everything.items() if last >= start and first < start + count
    }
    assert [need.first for need in needs] == sorted(need.first for need in needs)


@settings(deadline=None, max_examples=80)
@given(MIXED)
def test_most_chunks_is_the_most_that_lie_open(shape):
    order = Order(*shape)
    n = order.epoch_windows
    for epoch in (0, 1):
        spans = wanted(order, range(epoch * n, (epoch + 1) * n)).values()
        open_at = [sum(first <= w <= last for first, last in spans) for w in range(epoch * n, (epoch + 1) * n)]
        assert max(open_at) == order.most_chunks()


def test_chunks_move_on_and_share_each_window_equally():
    order = Order([640] * 40, 3, 16, 40, mix_chunks=8)
    assert order.most_chunks() <= 8 + 2
    for w in range(order.epoch_windows):
        window = order.window(w)
        assert window.chunk.max() - window.chunk.min() <= (4 if w == 0 else 9)
    for w in range(10, 30):
        counts = np.bincount(order.window(w).chunk)
        assert len(counts[counts > 0]) >= 8
        assert counts.max() <= 1.5 * 640 / 8
    # Where a chunk is wanted is the same in each epoch, which of its slices is not.
    n = order.epoch_windows
    assert all(np.array_equal(np.unique(order.window(w).chunk), np.unique(order.window(w + n).chunk)) for w in range(n))
    assert rows(order, [12]) != rows(order, [12 + n])


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
