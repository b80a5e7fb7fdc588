"""The directory of live training: what it needs, what it knows, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.activations.build import SITES, arrays, chunk_text, identity, make, write
from xlc_ray.activations import live, store
from xlc_ray.config import UserError
from xlc_ray.config.sources import LiveSource

ROWS = [50, 50, 30, 50, 20]


@pytest.fixture
def path(tmp_path):
    """Text of five chunks, activations of the first two, a held-out part."""
    path = str(tmp_path / "live")
    store.begin(path, identity(SITES))
    for index, count in enumerate(ROWS):
        store.write_text(path, chunk_text(index, count))
    for index in (0, 1):
        write(path, index, 50, 50 * index)
    store.write_plan(path, ROWS)
    make(tmp_path / "live/held_out", [40])
    return path


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (50, 1), (51, 2), (100, 2), (101, 3), (200, 5), (10**9, 5)])
def test_the_sample_is_the_first_chunks_that_hold_so_many_rows(tokens, chunks):
    assert live.sample_chunks(ROWS, tokens) == chunks


def test_it_knows_all_chunks_and_has_the_statistics_of_the_sample(path):
    data = store.open_source(LiveSource(path=path, sample_tokens=100))
    assert data.chunk_rows == ROWS
    assert data.kept_rows == [50, 50]
    assert data.manifest.tokens == 200
    for site, found in data.statistics().items():
        rows = np.concatenate([store.decode(arrays(50, 50 * i)[site], "bfloat16").double().numpy() for i in (0, 1)])
        assert found.count == 100
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0, ddof=1), rtol=1e-12)
    assert np.array_equal(data.windows(4).windows.tokens, chunk_text(4, 20).windows.tokens)
    data.verify()


def test_rows_of_the_sample_are_read_others_refused_in_a_line(path):
    data = store.open_source(LiveSource(path=path, sample_tokens=100))
    found = data.gather(np.array([1, 0]), np.array([7, 3]), ["mlp_in.0"])["mlp_in.0"]
    for got, (index, row) in zip(found, ((1, 7), (0, 3)), strict=True):
        assert torch.equal(torch.from_numpy(got), torch.from_numpy(arrays(50, 50 * index)["mlp_in.0"][row]))
    with pytest.raises(UserError, match="only while jobs") as error:
        data.gather(np.array([0, 2]), np.array([7, 3]), ["mlp_in.0"])
    assert "\n" not in str(error.value)


def test_a_damaged_sample_is_found(path):
    with open(f"{path}/chunk_1.hdf5", "r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    with pytest.raises(UserError, match="chunk_1"):
        store.open_source(LiveSource(path=path, sample_tokens=100)).verify()


@pytest.mark.parametrize(
    "missing", ["text/plan.json", "records/chunk_1.json", "chunk_0.hdf5", "held_out/manifest.json"]
)
def test_what_is_missing_stops_it(path, missing):
    assert live.is_ready(path, 100)
    store.files.remove(f"{path}/{missing}")
    assert not live.is_ready(path, 100)
    with pytest.raises(UserError, match="are not complete; generate again"):
        store.open_source(LiveSource(path=path, sample_tokens=100))


def test_a_larger_sample_than_is_stored_is_not_ready(path):
    assert not live.is_ready(path, 101)
