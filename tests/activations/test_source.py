from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.activations.build import SITES, make, row_ids
from xlc_ray.activations import source
from xlc_ray.activations.order import Order
from xlc_ray.activations.source import Share

CHUNKS = [50, 50, 50, 17]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp("store"), CHUNKS)


def ids(batches, site="mlp_in.0"):
    return [row_ids(batch[site]) for batch in batches]


def test_an_epoch_of_batches_is_every_row_once_remainders_included(data):
    order = Order(data.chunk_rows, 3, 8, 5)
    total = sum(CHUNKS)  # 167 is prime: 167 batches of 10 are ten epochs, and straddle them
    found = [i for batch in ids(source.batches(data, order, list(SITES), Share(10, 0, 167))) for i in batch]
    for epoch in range(10):
        assert sorted(found[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_rows_of_all_sites_belong_together_in_the_type_of_the_store(data):
    for batch in source.batches(data, Order(data.chunk_rows, 0, 8, 5), list(SITES), Share(12, 0, 5)):
        assert list(batch) == list(SITES)
        assert len({tuple(row_ids(values)) for values in batch.values()}) == 1
        for site, values in batch.items():
            assert values.dtype == getattr(torch, data.dtype)
            assert values.shape == (12, SITES[site])


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(0, 30), st.integers(0, 12), st.integers(0, 3))
def test_replicas_share_each_batch_wherever_reading_starts(data, share, replicas, start, count, seed):
    rows = share * replicas
    order = Order(data.chunk_rows, seed, 7, 4)
    whole = ids(source.batches(data, order, ["mlp_in.0"], Share(rows, 0, start + count)))[start:]
    parts = [
        ids(source.batches(data, Order(data.chunk_rows, seed, 7, 4), ["mlp_in.0"], share))
        for share in (Share(rows, start, start + count, r, replicas) for r in range(replicas))
    ]
    assert all(len(part) == count for part in parts)
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole
    for batch in whole[: max(0, sum(CHUNKS) // rows - start)]:  # those of the first epoch
        assert len(set(batch)) == rows  # so the shares are disjoint


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_micro_batch_holds_the_same_rows_for_any_number_of_replicas(data, replicas):
    order, parts = Order(data.chunk_rows, 1, 8, 5), 2
    (whole,) = ids(source.batches(data, order, ["mlp_in.0"], Share(24, 3, 4)))
    shares = [Share(24, 3, 4, replica, replicas, parts) for replica in range(replicas)]
    found = [next(iter(ids(source.batches(data, order, ["mlp_in.0"], share)))) for share in shares]
    size = 24 // replicas // parts
    for part in range(parts):
        micro = [row for rows in found for row in rows[part * size : (part + 1) * size]]
        assert micro == whole[part * 12 : (part + 1) * 12]


def test_batches_are_the_stream_of_the_order(data):
    order = Order(data.chunk_rows, 1, 8, 5)
    first = np.cumsum([0, *CHUNKS])
    windows = [order.window(w) for w in range(order.epoch_windows)]
    stream = [int(first[c] + r) for w in windows for c, r in zip(w.chunk, w.row, strict=True)]
    found = ids(source.batches(data, order, ["resid_post.0"], Share(40, 0, 4)), "resid_post.0")
    assert list(chain(*found)) == stream[:160]


def test_batches_of_a_url_equal_those_of_a_directory(data):
    remote = make("memory://source-test/store", CHUNKS)
    order = Order(data.chunk_rows, 1, 8, 5)
    for here, there in zip(
        *(source.batches(d, order, list(SITES), Share(30, 2, 9, 1, 2)) for d in (data, remote)), strict=True
    ):
        assert all(torch.equal(here[site], there[site]) for site in SITES)


def test_first_rows_are_the_start_of_the_stream_and_at_most_an_epoch(data):
    order = Order(data.chunk_rows, 1, 8, 5)
    (batch,) = source.batches(data, order, ["mlp_in.0"], Share(33, 0, 1))
    assert torch.equal(source.first_rows(data, order, ["mlp_in.0"], 33)["mlp_in.0"], batch["mlp_in.0"])
    everything = source.first_rows(data, order, ["mlp_in.0"], 10**9)["mlp_in.0"]
    assert sorted(row_ids(everything)) == list(range(sum(CHUNKS)))


def test_only_batches_across_blocks_are_copies():
    first, second = (np.arange(n, dtype=np.float32)[:, None] for n in (3, 5))
    found = [batch["x"] for batch in source.rebatch([{"x": first}, {"x": second}], 2, "float32")]
    assert [values.flatten().tolist() for values in found] == [[0, 1], [2, 0], [1, 2], [3, 4]]
    shared = [np.shares_memory(values.numpy(), first) or np.shares_memory(values.numpy(), second) for values in found]
    assert shared == [True, False, True, True]


def test_what_may_not_be_written_to_is_copied_to_the_memory_that_was_given():
    """As blocks of Ray's object store."""
    block, room = np.arange(6, dtype=np.float32)[:, None], np.empty((2, 1), np.float32)
    block.flags.writeable = False
    found = source.rebatch([{"x": block}], 2, "float32", lambda widths, rows, dtype: {"x": room})
    for batch, wanted in zip(found, ([0, 1], [2, 3], [4, 5]), strict=True):
        assert batch["x"].flatten().tolist() == wanted
        assert np.shares_memory(batch["x"].numpy(), room)


def test_no_batches_is_no_reading(data):
    assert list(source.batches(data, Order(data.chunk_rows, 0, 8, 20), ["mlp_in.0"], Share(4, 3, 3))) == []


def test_blocks_that_are_no_whole_batches_are_a_bug():
    with pytest.raises(AssertionError):
        list(source.rebatch([{"x": np.zeros((5, 2), np.float32)}], 4, "float32"))
