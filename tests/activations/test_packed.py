"""Rows that stay packed until they are on a device: the numbers that the reader would have made, bit for bit, in a
quarter of the bytes."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.activations.build import make
from tests.activations.test_compact import WIDTH, place, rough, whole
from tests.runs import SITES as RUN_SITES
from tests.runs import final_state, small_run_in
from xlc_ray.activations import source
from xlc_ray.activations.order import Order
from xlc_ray.activations.packed import PackedRows, Unpacker
from xlc_ray.dictionary import Shards
from xlc_ray.training import feed, loop, train_alone

__all__ = ["place"]  # a fixture
CPU = torch.device("cpu")
WIDTHS = {"mlp_in.0": WIDTH, "resid_post.0": WIDTH}
SITES = list(WIDTHS)
ROWS = (1500, 700, 1)


def make_store(path):
    chunks = [{site: rough(n, seed + 10 * i) for seed, site in enumerate(SITES)} for i, n in enumerate(ROWS)]
    return whole(path, chunks, WIDTHS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(str(tmp_path_factory.mktemp("packed")))


def by_definition(path):
    """Each chunk of a local store: centre + scale q in float32, a rounding after each, then the outliers."""
    found = []
    for index, rows in enumerate(ROWS):
        with h5py.File(f"{path}/chunk_{index}.hdf5") as file:
            chunk = {}
            for site in SITES:
                side, d = file[f"int8/{site}/side"][:], WIDTH
                centre, scale = side[: 4 * d].view("<f4"), side[4 * d : 8 * d].view("<f4")
                x = file[f"int8/{site}/values"][:].astype(np.float32) * scale + centre
                entries = side[8 * d + 4 * (-(-rows // 64) + 1) :].view([("r", "<i4"), ("c", "<i4"), ("x", "<f4")])
                assert len(entries) or rows < 1000, "some are planted"
                x[entries["r"], entries["c"]] = entries["x"]
                chunk[site] = x
        found.append(chunk)
    return found


def numbers(batch, unpack=None):
    """What comes of a batch on the device."""
    out = {site: torch.empty(sum(map(len, batch)), q.shape[1]) for site, q in batch[0].values.items()}
    (unpack or Unpacker(CPU))(batch, out)
    return out


def asked(rng, count):
    chunk = rng.integers(0, 3, count)
    row = (rng.random(count) * np.array(ROWS)[chunk]).astype(int)
    row[:2], chunk[:2] = 750, 0  # a planted outlier, twice
    return chunk, row


def test_the_device_makes_the_numbers_that_the_reader_makes(data):
    expected = by_definition(data.path)
    chunk, row = asked(np.random.default_rng(0), 600)
    rows = data.packed(chunk, row, SITES)
    assert {q.dtype for q in rows.values.values()} == {np.dtype(np.int8)}
    read, there = data.gather(chunk, row, SITES), numbers((rows,))
    for site in SITES:
        wanted = np.stack([expected[c][site][r] for c, r in zip(chunk, row, strict=True)])
        assert np.array_equal(read[site], wanted)
        assert np.array_equal(there[site].numpy(), wanted)
    assert there["mlp_in.0"][1, 5] == 1e4


def test_wherever_the_store_is(place):
    data = make_store(place)
    chunk, row = asked(np.random.default_rng(1), 300)
    there, read = numbers((data.packed(chunk, row, SITES),)), data.gather(chunk, row, SITES)
    assert all(np.array_equal(there[site].numpy(), read[site]) for site in SITES)
    order = Order(data.chunk_rows, 1, 16, 8)
    streams = (read(data, order, SITES, source.Share(50, 1, 7)) for read in (source.packed_batches, source.batches))
    for batch, wanted in zip(*streams, strict=True):
        assert all(torch.equal(numbers(batch)[site], wanted[site]) for site in SITES)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 40), cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 9))
def test_parts_are_the_rows_of_the_whole(data, count, cuts, seed):
    """Empty parts, too, and a part of a part."""
    chunk, row = asked(np.random.default_rng(seed), max(count, 2))
    chunk, row = chunk[:count], row[:count]
    rows, read = data.packed(chunk, row, SITES), data.gather(chunk, row, SITES)
    ends = sorted({0, count, *(min(cut, count) for cut in cuts)})
    parts = [rows.part(start, stop) for start, stop in pairwise(ends)] or [rows.part(0, 0)]
    again = [part.part(0, len(part)) for part in parts]
    for batch in ((rows,), tuple(parts), tuple(again)):
        assert all(np.array_equal(values.numpy(), read[site]) for site, values in numbers(batch).items())


@pytest.mark.parametrize(("batch_rows", "replicas"), [(24, 1), (24, 2), (500, 2), (1200, 3)])
def test_batches_over_borders_of_windows_and_epochs(data, batch_rows, replicas):
    order = Order(data.chunk_rows, 1, 16, 5)
    unpack, parts = Unpacker(CPU), set()
    for replica in range(replicas):
        what = data, order, SITES, source.Share(batch_rows, 1, 4 + 2400 // batch_rows, replica, replicas)
        for batch, wanted in zip(source.packed_batches(*what), source.batches(*what), strict=True):
            parts.add(len(batch))
            assert all(torch.equal(numbers(batch, unpack)[site], wanted[site]) for site in SITES)
    assert max(parts) > 1, "some straddle"


def test_training_is_fed_the_same(data):
    order = Order(data.chunk_rows, 2, 16, 5)
    what = data, order, SITES, source.Share(36, 0, 70)
    shape = feed.Shape(WIDTHS, 36, torch.float32, 80)
    found = feed.shared(lambda memory: source.packed_batches(*what), 70, shape, Shards(), CPU)
    sent = feed._sent(source.packed_batches(*what), 70, shape, Shards(), CPU)  # the way to a GPU
    for batch, other, wanted in zip(found, sent, source.batches(*what), strict=True):
        assert list(batch) == list(other) == SITES
        assert all(torch.equal(batch[site], wanted[site]) for site in SITES)
        assert all(torch.equal(other[site], wanted[site]) for site in SITES)


def test_a_run_that_unpacks_on_its_device_is_the_same_run(tmp_path, monkeypatch):
    make(tmp_path / "store", [90, 90, 23], "int8", RUN_SITES)
    config, states = small_run_in(tmp_path / "other"), []
    unpacked, times = Unpacker.__call__, []
    monkeypatch.setattr(Unpacker, "__call__", lambda *args: times.append(unpacked(*args)))
    for packed in (False, True):
        monkeypatch.setattr(loop, "goes_packed", lambda dtype, device, packed=packed: packed)
        run = config({"source.path": str(tmp_path / "store"), "out": str(tmp_path / f"run-{packed}")})
        train_alone(run)
        states.append(final_state(run))
        assert len(times) == (run.train.steps if packed else 0)
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_a_gpu_gets_packed_rows_of_int8_and_nothing_else_does():
    gpu = torch.device("cuda")
    assert feed.goes_packed("int8", gpu)
    assert not feed.goes_packed("int8", CPU)
    assert not any(feed.goes_packed(dtype, gpu) for dtype in ("float32", "float16", "bfloat16"))


def test_what_travels_is_a_quarter(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_t(3, (4, 2048, 64)).astype(np.float32)  # heavy tails
    data = whole(str(tmp_path), [{"mlp_in.0": part} for part in x], {"mlp_in.0": 64})
    order, travelled = Order(data.chunk_rows, 0, 64, 64), []

    def noted(arrays, device):
        travelled.extend(array.nbytes for array in arrays)
        return sent(arrays, device)

    sent = Unpacker.__call__.__globals__["_sent"]
    monkeypatch.setattr("xlc_ray.activations.packed._sent", noted)
    unpack, whole_batches = Unpacker(CPU), 0
    for batch in source.packed_batches(data, order, ["mlp_in.0"], source.Share(256, 0, 32)):
        whole_batches += numbers(batch, unpack)["mlp_in.0"].nbytes
    assert whole_batches == x.nbytes
    assert 0.25 < sum(travelled) / x.nbytes < 0.3


def test_scales_are_looked_up_by_identity(data):
    """Blocks of the same rows of other chunks: what is on the device is not taken for theirs."""
    unpack, row = Unpacker(CPU), np.arange(40)
    for chunk in (0, 1, 0):
        where = np.full(40, chunk)
        there = numbers((data.packed(where, row, SITES),), unpack)
        assert all(np.array_equal(there[s].numpy(), x) for s, x in data.gather(where, row, SITES).items())


def test_parts_share_their_scales(data):
    rows = data.packed(np.zeros(9, int), np.arange(9), SITES)
    assert rows.part(2, 5).scales is rows.scales
    assert {field.name for field in fields(PackedRows)} == {"values", "chunk", "scales", "outliers"}
