"""A global shuffle is a permutation of rows that mixes everything and keeps a row's sites and text together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations import build
from tests.activations.build import SITES, chunk_text, make, row_ids, row_tokens
from xlc_ray.activations import store
from xlc_ray.activations.shuffling import Permutation, Shuffle, write_new, write_part
from xlc_ray.activations.windows import ChunkText, Windows
from xlc_ray.config import UserError


@given(count=st.integers(1, 5000), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_it_is_a_permutation_and_the_inverse_undoes_it(count, seed):
    order, here = Permutation(count, seed), np.arange(count)
    found = order(here)
    assert np.array_equal(np.sort(found), here)
    assert np.array_equal(order.inverse(found), here)


@pytest.mark.parametrize("count", [1 << 20, (1 << 20) + 1, (1 << 40) + 12345])
def test_large_ones_are_evaluated_anywhere(count):
    order, here = Permutation(count, 3), np.linspace(0, count - 1, 1000, dtype=np.int64)
    found = order(here)
    assert found.min() >= 0
    assert found.max() < count
    assert np.array_equal(order.inverse(found), here)


def test_places_are_as_good_as_random():
    count = 100_000
    found = Permutation(count, 0)(np.arange(count))
    # Of 100 bins of 1,000 rows each of which goes anywhere: chi squared of 99 degrees of freedom, by old and new bin.
    table = np.zeros((100, 100))
    np.add.at(table, (np.arange(count) // 1000, found // 1000), 1)
    assert abs(((table - 10) ** 2 / 10).sum() - 99**2) < 5 * np.sqrt(2 * 99**2)
    # Neighbours part: their distances are those of two random rows, a third of the whole on average.
    assert abs(np.abs(np.diff(found)).mean() / count - 1 / 3) < 0.005
    assert (Permutation(count, 1)(np.arange(count)) == found).sum() < 10


ROWS = [50, 50, 13, 1]


def shuffled(old, new, seed=5, step=30):
    """Both passes, in this process."""
    how = Shuffle(tuple(old.chunk_rows), seed, step)
    identity = old.manifest.identity | {"chunk_tokens": step}
    new, parts = str(new), f"{new}/parts"
    for place, plan in ((parts, how.chunk_rows), (new, how.plan)):
        store.begin(place, identity)
        store.write_plan(place, plan)
    for chunk in range(len(how.chunk_rows)):
        write_part(how, old, parts, chunk)
    store.finish(parts, identity)
    for index, before in enumerate(how.pieces()):
        write_new(how, store.open_store(parts), new, index, before)
    store.finish(new, identity)
    return store.open_store(new)


@pytest.mark.parametrize(("step", "url"), [(1, None), (30, None), (57, None), (1000, None), (30, "memory://shuffled")])
def test_every_row_goes_where_the_permutation_says_with_all_sites_and_its_text(tmp_path, step, url):
    old = make(tmp_path / "old", ROWS)
    new = shuffled(old, url or tmp_path / "new", step=step)
    order = Permutation(sum(ROWS), 5)(np.arange(sum(ROWS)))
    first, at = np.cumsum([0, *ROWS]), 0
    for index, size in enumerate(new.chunk_rows):
        source = order[at : at + size]
        chunk = np.searchsorted(first, source, side="right") - 1
        expected = old.gather(chunk, source - first[chunk], list(SITES))
        found = new.read(index, 0, size, list(SITES))
        assert all(np.array_equal(found[site], expected[site]) for site in SITES)
        assert row_ids(store.decode(found["mlp_in.0"], "bfloat16")) == source.tolist()
        texts = {c: chunk_text(c, ROWS[c]) for c in set(chunk.tolist())}
        wanted = [row_tokens(texts[c])[r] for c, r in zip(chunk.tolist(), source - first[chunk], strict=True)]
        text = new.windows(index)
        assert row_tokens(text).tolist() == wanted
        origins = zip(chunk.tolist(), source - first[chunk], strict=True)
        assert len(text.windows) == len({(c, texts[c].row_window[r]) for c, r in origins})
        at += size
    assert at == sum(ROWS)


def test_statistics_stay_what_they_were(tmp_path):
    old = make(tmp_path / "old", ROWS)
    before, after = old.statistics(), shuffled(old, tmp_path / "new").statistics()
    for site in SITES:
        np.testing.assert_allclose(after[site].mean, before[site].mean, rtol=1e-12)
        np.testing.assert_allclose(after[site].std, before[site].std, rtol=1e-12)


def test_the_text_of_each_old_chunk_is_read_once(tmp_path, monkeypatch):
    old = make(tmp_path / "old", [3] * 60)
    texts, pieces, read_text, bytes_of = [], [], store.read_text, store.Store.bytes_of
    monkeypatch.setattr(store, "read_text", lambda path, index: texts.append(index) or read_text(path, index))
    monkeypatch.setattr(store.Store, "bytes_of", lambda self, spans: pieces.extend(spans) or bytes_of(self, spans))
    shuffled(old, tmp_path / "new")
    assert texts == list(range(60))
    assert len(pieces) <= 2 * 180, "of a piece of a part, where its rows stand and their windows"
    assert sum(piece.stop - piece.start for piece in pieces) <= 180 * (16 + 8 * 4)


def test_windows_of_several_widths_and_far_apart_in_a_part(tmp_path, monkeypatch):
    texts = {}

    def text(index, rows):
        """Chunks of windows of 8 and of 30,000 tokens, which are farther apart than is read together."""
        made, width = chunk_text(index, rows), 30_000 if index else 8
        tokens = np.pad(made.windows.tokens, ((0, 0), (0, width - 8)), constant_values=index)
        texts[index] = ChunkText(index, Windows(tokens, made.windows.length), made.row_window, made.row_position)
        return texts[index]

    monkeypatch.setattr(build, "chunk_text", text)
    new = shuffled(make(tmp_path / "old", [20, 30]), tmp_path / "new", step=9)
    source = Permutation(50, 5)(np.arange(50))
    for index, size in enumerate(new.chunk_rows):
        found = new.windows(index)
        here = source[9 * index :][:size]
        origins = [(texts[int(row >= 20)], int(row - 20 * (row >= 20))) for row in here]
        width = max(text.windows.tokens.shape[1] for text, _ in origins)
        for (text, row), window, position in zip(origins, found.row_window, found.row_position, strict=True):
            wanted = text.windows.tokens[text.row_window[row]]
            assert np.array_equal(found.windows.tokens[window], np.pad(wanted, (0, width - len(wanted))))
            assert found.windows.length[window] == text.windows.length[text.row_window[row]]
            assert position == text.row_position[row]


def test_damage_is_not_made_new_rows_of(tmp_path):
    old = make(tmp_path / "old", ROWS)
    with (tmp_path / "old/chunk_1.hdf5").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: altered"):
        shuffled(old, tmp_path / "new")
