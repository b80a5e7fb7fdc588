"""Memory that batches lie in is used again, and never while a rank may still look at it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.activations.build import SITES, make
from xlc_ray.activations import source
from xlc_ray.activations.order import Order
from xlc_ray.activations.source import Memory, Share
from xlc_ray.dictionary import Shards
from xlc_ray.training import feed
from xlc_ray.training.rooms import LINE, Rooms

ROW = 2 * sum(SITES.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("store"), [50, 50, 50, 17])


def begins(arrays):
    return min(values.__array_interface__["data"][0] for values in arrays.values())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 90), slice_rows=st.integers(1, 40), window_slices=st.integers(1, 6))
def test_a_batch_stays_until_the_next_one_is_handed_out(data, rows, slice_rows, window_slices):
    """Another rank may still compute on batch n - 1 while the leader makes batch n."""
    order, count = Order(data.chunk_rows, 1, slice_rows, window_slices), 400 // rows + 2
    rooms = Rooms.own(*(n * ROW + LINE * len(SITES) for n in (slice_rows * window_slices, rows)))
    before = None
    what = data, order, list(SITES), Share(rows, 0, count)
    start, memory = rooms._memory.data_ptr(), Memory(rooms.window, rooms.batch)
    for batch, wanted in zip(source.batches(*what, memory), source.batches(*what), strict=True):
        rooms.hand_out(batch)
        where = rooms.places(batch)
        assert where == [values.data_ptr() - start for values in batch.values()], "nothing is copied once more"
        seen = {
            site: rooms.at(place, batch[site].shape, torch.bfloat16) for site, place in zip(batch, where, strict=True)
        }
        for site in SITES:
            assert torch.equal(seen[site], wanted[site])
            if before is not None:
                assert torch.equal(before[0][site], before[1][site])
        before = seen, wanted


def test_windows_take_turns_in_two_rooms():
    rooms, sizes = Rooms.own(4096, 64), ({"a": 8}, 16, np.dtype(np.uint16))
    found = []
    for _ in range(6):
        window = rooms.window(*sizes)
        found.append(begins(window))
        for start in (0, 8):
            rooms.hand_out({"a": torch.from_numpy(window["a"])[start : start + 8]})
    assert len(set(found)) == 2
    assert found[0::2] == [found[0]] * 3
    assert found[1::2] == [found[1]] * 3


def test_a_window_that_finds_no_room_gets_memory_of_its_own():
    rooms, sizes = Rooms.own(4096, 64), ({"a": 8}, 16, np.dtype(np.uint16))
    first = rooms.window(*sizes)
    rooms.hand_out({"a": torch.from_numpy(first["a"])})
    second = rooms.window(*sizes)
    second["a"][:] = 2
    rooms.hand_out({"a": torch.from_numpy(second["a"])})
    first["a"][:] = 1  # the batch before the last: free again
    third = rooms.window(*sizes)
    assert begins(third) == begins(first)
    large = rooms.window({"a": 8}, 4096, np.dtype(np.uint16))
    assert large["a"].shape == (4096, 8)
    large["a"][:] = 7
    assert not (third["a"] == 7).any()
    assert not (second["a"] == 7).any()


def test_arrays_of_a_window_do_not_overlap():
    rooms = Rooms.own(4096, 64)
    window = rooms.window({"a": 3, "b": 5, "c": 1}, 7, np.dtype(np.uint16))
    for number, values in enumerate(window.values()):
        values[:] = number
    assert all((values == number).all() for number, values in enumerate(window.values()))


def test_one_rank_reads_every_window_into_the_same_two_rooms(tmp_path):
    data = make(tmp_path / "store", [40, 40, 40])
    what = data, Order(data.chunk_rows, 0, 10, 2), list(SITES), Share(10, 0, 60)

    def read(memory):
        return source.batches(*what, memory)

    shape = feed.Shape(SITES, 10, torch.bfloat16, 20)
    plain = source.batches(*what)
    pages = set()
    for batch, wanted in zip(feed.shared(read, 60, shape, Shards(), torch.device("cpu")), plain, strict=True):
        assert all(torch.equal(batch[site], wanted[site]) for site in SITES)
        pages |= {values.data_ptr() // 4096 for values in batch.values()}
    assert len(pages) <= 4  # a window is less than a page, which may lie across two
