"""What inspection says of stores whose rows are known."""

import numpy as np
import pytest
import torch

from tests.activations.build import SITES, chunk_text, identity, make, row_tokens
from xlc_ray.activations import inspect, store, summary
from xlc_ray.activations.manifest import SiteStatistics
from xlc_ray.config import UserError

ROWS = [300, 300, 40]


def numbers(ids):
    return " ".join(map(str, ids))


def everything(data, site):
    return torch.cat(
        [store.decode(data.read(i, 0, n, [site])[site], data.dtype) for i, n in enumerate(data.chunk_rows)]
    )


def test_norms_are_those_of_the_rows_drawn(tmp_path):
    data = make(tmp_path, ROWS)
    found = inspect.sample(data, 150, 0)
    assert len(found) == 150
    where = np.cumsum([0, *ROWS])[found.chunk] + found.row
    assert len(set(where.tolist())) == 150
    for site in SITES:
        expected = everything(data, site).double().norm(dim=1).numpy()[where]
        np.testing.assert_allclose(found.norms[site], expected, rtol=1e-12)
    again, other = inspect.sample(data, 150, 0), inspect.sample(data, 150, 1)
    assert np.array_equal(found.row, again.row)
    assert not np.array_equal(found.row, other.row)


def test_short_slices_make_no_smaller_sample(tmp_path):
    data = make(tmp_path, [65] * 4)  # the second slice of each chunk is of one row
    found = inspect.sample(data, 130, 0)
    assert len(set(zip(found.chunk.tolist(), found.row.tolist(), strict=True))) == 130


def test_more_rows_than_there_are_is_all_of_them(tmp_path):
    data = make(tmp_path, ROWS)
    found = inspect.sample(data, 10**6, 0)
    assert sorted(zip(found.chunk.tolist(), found.row.tolist(), strict=True)) == [
        (chunk, row) for chunk, rows in enumerate(ROWS) for row in range(rows)
    ]


def with_outlier(path):
    """One row of the second chunk is long at one site; nothing else is."""
    site = {"mlp_in.0": 4, "mlp_out.0": 4}
    values = torch.ones(100, 4)
    store.begin(str(path), identity(site))
    for index in range(2):
        store.write_text(str(path), chunk_text(index, 100))
        long = values.clone()
        if index == 1:
            long[37] = 40.0
        arrays = {"mlp_in.0": store.encode(values, "bfloat16", ""), "mlp_out.0": store.encode(long, "bfloat16", "")}
        store.write_chunk(str(path), index, arrays, "bfloat16")
    store.write_plan(str(path), [100, 100])
    store.finish(str(path), identity(site))
    return store.open_store(str(path))


def test_an_outlier_is_found_with_its_text(tmp_path):
    data = with_outlier(tmp_path)
    found = inspect.sample(data, 200, 0)
    excess, sites = found.excess()
    (i,) = np.flatnonzero(excess >= inspect.OUTLIER)
    assert (found.chunk[i], found.row[i], sites[i], excess[i]) == (1, 37, "mlp_out.0", 40.0)
    head, first, *_ = summary.outliers(data, found, 2, numbers)
    assert head.startswith("1 of 200 rows have 10 times")
    # Row 37 is position 3 of window 5, whose tokens count from 40.
    words = "40.0 x at mlp_out.0 chunk 1 row 37 (window 5, position 3): 40 41 42[43]44 45 46 47"
    assert first.split() == words.split()


def test_a_site_that_is_mostly_silent_has_no_outliers():
    found = inspect.Sample(np.zeros(3), np.arange(3), {"a": np.array([0.0, 0.0, 5.0]), "b": np.array([1.0, 1.0, 2.0])})
    assert found.excess()[0].tolist() == [1.0, 1.0, 2.0]


def test_text_of_a_row_is_that_of_its_window(tmp_path):
    data, text = make(tmp_path, ROWS), chunk_text(1, 300)
    for row in (0, 6, 7, 299):
        found = inspect.trace(data, 1, row, before=100, after=100)
        window = text.windows.tokens[text.row_window[row]].tolist()
        assert [*found.before, found.token, *found.after] == window
        assert found.token == row_tokens(text)[row]
    short = inspect.trace(data, 1, 6, before=2, after=0)
    assert (short.before, short.token, short.after) == ([5, 6], 7, [])


def test_pictures_share_one_logarithmic_axis():
    norms = {"small": np.array([1.0] * 99 + [10.0]), "large": np.full(100, 100.0), "none": np.zeros(5)}
    drawn, ends = inspect.pictures(norms, 21)
    assert ends == (1.0, 100.0)
    assert drawn["small"] == "●" + "─" * 10 + " " * 10
    assert drawn["large"] == " " * 20 + "●"
    assert drawn["none"] == "●" + " " * 20
    assert inspect.pictures({"same": np.ones(3)}, 5)[0]["same"] == "●    "


def statistics(mean, std, norm=1.0):
    return SiteStatistics(100, np.array(mean, float), np.array(std, float), norm)


def test_differences_by_hand():
    first = {"a": statistics([0, 0, 5], [1, 2, 0], 4.0), "only": statistics([0], [1])}
    second = {"a": statistics([1, 0, 9], [1, 6, 1], 6.0)}
    (found,) = inspect.differences(first, second).values()
    assert found.shift == pytest.approx(np.sqrt((1 + 0) / 2))
    assert (found.least_spread, found.median_spread, found.most_spread) == (1.0, 2.0, 3.0)
    assert (found.norm, found.constant) == (1.5, 1)


def test_a_store_does_not_differ_from_itself(tmp_path):
    s = make(tmp_path, ROWS).statistics()
    for found in inspect.differences(s, s).values():
        assert (found.shift, found.least_spread, found.most_spread, found.norm) == (0.0, 1.0, 1.0, 1.0)


def test_stores_that_cannot_be_compared_say_why():
    one = {"a": statistics([0], [1])}
    with pytest.raises(UserError, match="no site of both; a here, b there"):
        inspect.differences(one, {"b": statistics([0], [1])})
    with pytest.raises(UserError, match="a is 1 wide here and 2 there"):
        inspect.differences(one, {"a": statistics([0, 0], [1, 1])})


def test_a_summary_says_what_is_there(tmp_path):
    data = make(tmp_path, ROWS)
    make(tmp_path / "held_out", [7])
    said = "\n".join(summary.described(data))
    assert "640 rows of 3 sites in 3 chunks" in said
    assert "text novels.txt (train), windows of 8 tokens" in said
    assert "held out: 7 rows" in said
    table = list(summary.norms_table(data, inspect.sample(data, 64, 0)))
    assert [line.split()[:2] for line in table[1:-1]] == [[site, str(width)] for site, width in SITES.items()]
    exact = everything(data, "mlp_out.0").double()
    assert table[2].split()[2:4] == [f"{exact.var(0).mean().sqrt():.4g}", f"{exact.norm(dim=1).mean():.4g}"]
