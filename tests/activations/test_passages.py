"""Batches of text: every stored row once an epoch, each in its own window, whatever the batch size."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.activations.build import chunk_text, identity, make, write
from xlc_ray.activations import store
from xlc_ray.activations.passages import PassageStream

ROWS = [90, 23, 60]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return PassageStream(make(tmp_path_factory.mktemp("passages"), ROWS), seed=5)


def rows(passages):
    """(window's first token, position) of each kept token: the first names the window in a chunk of its own."""
    where = passages.keep.nonzero()
    return [(tuple(passages.tokens[n].tolist()), int(i)) for n, i in where]


def whole(path):
    """The rows of a store by its own account, with how often they occur in it."""
    data = store.open_store(str(path))
    found = []
    for chunk in range(len(data.chunk_rows)):
        text = data.windows(chunk)
        for window, position in zip(text.row_window, text.row_position, strict=True):
            found.append((tuple(text.windows.tokens[window].tolist()), int(position)))
    return found


@pytest.mark.parametrize("size", [1, 7, 40, 173, 500])
def test_batches_hold_exactly_their_rows_and_every_row_once_an_epoch(stream, tmp_path, size):
    make(tmp_path, ROWS)
    want, total = sorted(whole(tmp_path)), sum(ROWS)
    assert stream.rows == total
    epochs = 2 if size < total else 6
    cuts = [*range(0, epochs * total, size), epochs * total]
    batches = [stream.read(a, b) for a, b in itertools.pairwise(cuts)]
    assert all(int(p.keep.sum()) == b - a for p, a, b in zip(batches, cuts, cuts[1:], strict=False))
    assert all((p.attention.bool() | ~p.keep).all() for p in batches)
    seen = [row for p in batches for row in rows(p)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == want
    assert seen[:total] != seen[total : 2 * total], "each epoch has an order of its own"


def test_any_range_is_its_parts_one_after_another(stream):
    for a, b, c in ((0, 5, 60), (3, 100, 173), (170, 180, 400)):
        assert rows(stream.read(a, c)) == rows(stream.read(a, b)) + rows(stream.read(b, c))


def test_a_range_reads_no_window_without_a_row_of_it(stream):
    for start in range(0, 346, 13):
        passages = stream.read(start, start + 13)
        assert passages.keep.any(dim=1).all()
        assert len(passages.tokens) <= 13 // 7 + 3  # windows of 7 rows, cut short at the end of three chunks


def test_the_seed_decides_the_order(stream, tmp_path):
    other = PassageStream(make(tmp_path, ROWS), seed=6)
    assert rows(other.read(0, 173)) != rows(stream.read(0, 173))
    assert sorted(rows(other.read(0, 173))) == sorted(rows(stream.read(0, 173)))


def test_rows_that_the_store_left_out_are_never_kept(tmp_path):
    """The last window of a plan is cut so that the total is exact: its other tokens are context at most."""
    path = str(tmp_path)
    store.begin(path, identity({"mlp_in.0": 6}))
    store.write_text(path, chunk_text(0, 10))
    write(path, 0, 10, 0, sites={"mlp_in.0": 6})
    store.write_plan(path, [10])
    store.finish(path, identity({"mlp_in.0": 6}))
    passages = PassageStream(store.open_store(path), 0).read(0, 10)
    kept = {int(t[0]) // 8: keep.tolist() for t, keep in zip(passages.tokens, passages.keep, strict=True)}
    assert kept == {0: [False] + [True] * 7, 1: [False] + [True] * 3 + [False] * 4}
    assert torch.equal(passages.attention, torch.ones(2, 8, dtype=torch.int64))
