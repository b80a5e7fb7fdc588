"""Rows of local files come to their places, whichever of them lie together; a file that ends early is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlc_ray.activations import chunkfile, reading
from xlc_ray.config import UserError

ROWS, WIDTHS = 400, {"mlp_in.0": 8, "resid_post.0": 1500}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A chunk file, its record and its arrays: many rows of one site are shorter than the gap, two of the other not."""
    place = tmp_path_factory.mktemp("chunk")
    rng = np.random.default_rng(0)
    arrays = {site: rng.integers(0, 2**16, (ROWS, width)).astype(np.uint16) for site, width in WIDTHS.items()}
    return str(place / "chunk_0.hdf5"), chunkfile.write(str(place), 0, arrays), arrays


@given(
    starts=st.lists(st.integers(0, ROWS - 1), max_size=12),
    length=st.integers(1, 200),
    seed=st.none() | st.integers(0, 9),
)
@settings(deadline=None, max_examples=50)
def test_any_rows_come_to_their_places(written, starts, length, seed):
    """Runs with and without gaps between them; places as they lie (None) or mixed."""
    path, record, arrays = written
    rows = np.unique(np.concatenate([np.arange(s, min(s + length, ROWS)) for s in [*starts, 0]]))
    to = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
    out = {site: np.zeros((len(rows), width), np.uint16) for site, width in WIDTHS.items()}
    reading.scatter(path, record, WIDTHS, "bfloat16", rows, to, out)
    assert all(np.array_equal(out[site][to], arrays[site][rows]) for site in WIDTHS)


@pytest.mark.parametrize("rows", [[3, 3, 4, 9], [3, 3, 5], [7, 7]])
def test_a_row_asked_for_twice_comes_twice(written, rows):
    path, record, arrays = written
    out = {"mlp_in.0": np.zeros((len(rows), 8), np.uint16)}
    reading.scatter(path, record, WIDTHS, "bfloat16", np.array(rows), np.arange(len(rows)), out)
    assert np.array_equal(out["mlp_in.0"], arrays["mlp_in.0"][rows])


def test_a_file_that_is_cut_while_it_is_open_is_named(written):
    path, _, _ = written
    with open(path, "rb", buffering=0) as file:
        end = file.seek(0, 2)
        with pytest.raises(UserError, match=r"chunk_0\.hdf5: cut or altered"):
            reading._read_into(file, path, np.empty(100, np.uint8), end - 50)
