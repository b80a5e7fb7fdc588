"""What generation does to a directory before it makes anything."""

from __future__ import annotations

import pytest

from xlc_ray.activations import store
from xlc_ray.cluster import plan
from xlc_ray.config import UserError


def test_a_file_of_somebody_else_is_no_claim_that_gives_way(tmp_path):
    theirs = tmp_path / "identity.json"
    theirs.write_text('{"name": "me"}')
    with pytest.raises(UserError, match=r"identity\.json: is none of a store; choose another source\.path"):
        plan.claim(str(tmp_path), {"format_version": 1, "dtype": "float32"})
    assert theirs.read_text() == '{"name": "me"}'


def test_text_of_an_unfinished_plan_goes_and_a_corpus_beside_it_stays(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("chunk_0.npz", "chunk_12.npz", "a.txt", "chunk_1.npz.txt"):
        (text / name).write_text(name)
    store.remove_text(str(tmp_path))
    assert sorted(path.name for path in text.iterdir()) == ["a.txt", "chunk_1.npz.txt"]
