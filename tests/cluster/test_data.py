"""Ray Data feeds exactly the batches that the in-process reader gives."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from tests.activations.test_compact import whole
from xlc_ray.activations import source, store
from xlc_ray.activations.order import Order
from xlc_ray.activations.packed import Unpacker
from xlc_ray.activations.source import Share
from xlc_ray.activations.windows import ChunkText, Windows
from xlc_ray.cluster import data
from xlc_ray.cluster.cli import find_user_error
from xlc_ray.config import UserError

pytestmark = pytest.mark.cluster

ROWS = (700, 333, 1000)
WIDTHS = {"mlp_in.0": 8, "mlp_out.0": 8}
SITES = tuple(WIDTHS)
BATCH = 60


@pytest.fixture(scope="module")
def activations(tmp_path_factory, tiny_config):
    """A store whose rows are all different: 2,033 rows in three chunks, bfloat16."""
    path = str(tmp_path_factory.mktemp("data") / "store")
    return make_store(path, tiny_config(path))


def make_store(path, config):
    identity = store.identity(config.override({"generate.tokens": sum(ROWS)}), WIDTHS, held_out=False)
    store.begin(path, identity)
    generator = torch.Generator().manual_seed(0)
    for index, rows in enumerate(ROWS):
        text = Windows(np.zeros((1, rows), np.int32), np.array([rows], np.int32))
        position = np.arange(rows, dtype=np.int32)
        store.write_text(path, ChunkText(index, text, np.zeros_like(position), position))
        values = {site: torch.randn(rows, width, generator=generator) for site, width in WIDTHS.items()}
        store.write_chunk(path, index, {s: store.encode(v, "bfloat16", s) for s, v in values.items()}, "bfloat16")
    store.write_plan(path, ROWS)
    store.finish(path, identity)
    return store.open_store(path)


def order_of(opened):
    return Order(opened.chunk_rows, seed=3, slice_rows=16, window_slices=10)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(one[site].dtype == torch.bfloat16 and torch.equal(one[site], other[site]) for site in one)


def test_pipeline_equals_the_in_process_reader_over_epochs_and_pipelines(cluster, activations, monkeypatch):
    monkeypatch.setattr(data, "PIPELINE_TASKS", 2)  # 13 windows an epoch, 8 a task: the stream needs several pipelines
    batches = 2 * sum(ROWS) // BATCH + 5
    args = (activations, order_of(activations), SITES, Share(BATCH, 0, batches))
    assert_same(data.replica_batches(*args), source.batches(*args))


def test_start_in_the_middle_with_replicas_that_share_each_batch(cluster, activations):
    args = (activations, order_of(activations), SITES)
    whole = list(source.batches(*args, Share(BATCH, 11, 21)))
    shares = [Share(BATCH, 11, 21, replica, 2) for replica in range(2)]
    parts = [list(data.replica_batches(*args, share)) for share in shares]
    for share, part in zip(shares, parts, strict=True):
        assert_same(part, source.batches(*args, share))
    rejoined = [{site: torch.cat([a[site], b[site]]) for site in SITES} for a, b in zip(*parts, strict=True)]
    assert_same(rejoined, whole)


def test_a_run_without_an_end_begins(cluster, activations):
    """What is read later is not listed before: it would take all memory."""
    batches = data.replica_batches(activations, order_of(activations), SITES, Share(BATCH, 0, 10**9))
    first = next(iter(batches))
    batches.close()
    assert_same([first], source.batches(activations, order_of(activations), SITES, Share(BATCH, 0, 1)))


def test_no_batches_asked_for_is_no_batches(cluster, activations):
    assert list(data.replica_batches(activations, order_of(activations), SITES, Share(BATCH, 7, 7))) == []


def test_a_worker_can_read_while_others_hold_every_cpu(cluster, activations):
    # Training workers may take all CPUs that Ray counts; readers must not wait for one.
    @ray.remote(num_cpus=4)
    def total():
        batches = data.replica_batches(activations, order_of(activations), SITES, Share(BATCH, 0, 3))
        return sum(float(batch["mlp_in.0"].double().sum()) for batch in batches)

    expected = source.batches(activations, order_of(activations), SITES, Share(BATCH, 0, 3))
    assert ray.get(total.remote(), timeout=300) == sum(float(batch["mlp_in.0"].double().sum()) for batch in expected)


def test_a_damaged_chunk_reaches_the_user_as_one_line(cluster, tmp_path, tiny_config):
    opened = make_store(str(tmp_path / "store"), tiny_config(tmp_path))
    with open(tmp_path / "store/chunk_1.hdf5", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ray.exceptions.RayError) as error:
        list(data.replica_batches(opened, order_of(opened), SITES, Share(BATCH, 0, sum(ROWS) // BATCH)))
    mistake = find_user_error(error.value)
    assert isinstance(mistake, UserError)
    assert "chunk_1.hdf5: cut or altered: 1000 bytes" in str(mistake)


def test_packed_rows_arrive_as_they_were_read(cluster, tmp_path):
    """int8 rows in a quarter of the bytes, straddling windows, over several epochs and shared by replicas."""
    generator = torch.Generator().manual_seed(1)
    chunks = [{site: torch.randn(n, 8, generator=generator).numpy() for site in SITES} for n in ROWS]
    chunks[0][SITES[0]][500, 3] = 1e4  # an outlier
    opened = whole(str(tmp_path / "store"), chunks, WIDTHS)
    for replica in range(2):
        args = (opened, order_of(opened), SITES, Share(BATCH, 3, 3 + 2 * sum(ROWS) // BATCH, replica, 2))
        found = list(data.packed_replica_batches(*args))
        assert {q.dtype for batch in found for rows in batch for q in rows.values.values()} == {np.dtype(np.int8)}
        unpack = Unpacker(torch.device("cpu"))
        for batch, wanted in zip(found, source.batches(*args), strict=True):
            numbers = {site: torch.empty(BATCH // 2, 8) for site in SITES}
            unpack(batch, numbers)
            assert all(torch.equal(numbers[site], wanted[site]) for site in SITES)


def test_a_window_in_the_object_store_is_a_quarter(tmp_path):
    x = np.random.default_rng(0).standard_t(3, (4096, 64)).astype(np.float32)  # heavy tails
    opened = whole(str(tmp_path / "store"), [{"mlp_in.0": x}], {"mlp_in.0": 64})
    rows = opened.packed(np.zeros(4096, int), np.arange(4096), ["mlp_in.0"])
    table = data._table(rows)
    assert 0.25 < table.nbytes / x.nbytes < 0.3
    (found,) = data._of_table(table)
    assert np.shares_memory(found.values["mlp_in.0"], rows.values["mlp_in.0"]), "it is read where it lies"
