"""Files at paths and URLs: whole or not at all, and what a user can mend is said in a line."""

from __future__ import annotations

import os

import pytest

from xlc_ray import files
from xlc_ray.config import UserError


@pytest.mark.parametrize("base", ["{tmp}", "file://{tmp}", "memory://files"])
def test_verbs_agree_at_paths_and_urls(tmp_path, base):
    base = base.format(tmp=tmp_path / "deep")
    path = files.join(base, "a", "note.json")
    assert files.listdir(base) == []
    files.write_json(path, {"x": [1.5, None]})
    files.append(files.join(base, "lines"), "one\n")
    files.append(files.join(base, "lines"), "two\n")
    assert files.read_json(path) == {"x": [1.5, None]}
    assert files.read_bytes(files.join(base, "lines")) == b"one\ntwo\n"
    assert files.listdir(base) == ["a", "lines"]
    assert files.name(path) == "note.json"
    files.copy(path, files.join(base, "copy"))
    files.write_json(path, {})
    assert files.read_json(files.join(base, "copy")) == {"x": [1.5, None]}
    files.remove(files.join(base, "a"))
    assert not files.exists(path)
    files.remove(path)  # what is not there needs no removing


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = str(tmp_path / "note")
    files.write_bytes(path, b"old")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):  # not for the user to mend: it stays what it is
        files.write_bytes(path, b"new")
    assert (tmp_path / "note").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["note"]


def test_full_disk_is_one_line():
    with pytest.raises(UserError, match=r"/dev/full: cannot be written: No space left on device"):
        files.append("/dev/full", "x" * 10)


def test_place_that_is_no_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        files.write_bytes(str(tmp_path / "file" / "note"), b"x")
