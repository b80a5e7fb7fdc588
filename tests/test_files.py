"""Files at paths and URLs: whole or not at all, and what a user can mend is said in a line."""

from __future__ import annotations

import errno
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


def refusing(monkeypatch, number: int, path: str, times: int = 10**9) -> list[int]:
    """Make the system fail so often to tell of `path`, with this number of error; a list of those that are left."""
    left, stat = [times], os.stat

    def fail(asked, *args, **kwargs):
        if str(asked) == path and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return stat(asked, *args, **kwargs)

    monkeypatch.setattr(os, "stat", fail)
    return left


def test_what_a_file_system_does_not_tell_is_not_taken_for_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "there")
    files.write_bytes(path, b"")
    assert files.exists(path)
    assert not files.exists(path + "/beyond")
    assert not files.exists(str(tmp_path / "nowhere/there"))
    with monkeypatch.context() as patch:
        refusing(patch, errno.EIO, path)
        with pytest.raises(OSError, match="Input/output error"):
            files.exists(path)
    with monkeypatch.context() as patch:
        refusing(patch, errno.EACCES, path)
        with pytest.raises(UserError, match="there: cannot be looked for: Permission denied"):
            files.exists(path)


def test_who_waits_is_answered_when_the_file_system_is_back(tmp_path, monkeypatch):
    path, failed = str(tmp_path / "there"), []
    files.write_bytes(path, b"")
    left = refusing(monkeypatch, errno.ESTALE, path, times=2)
    assert files.waiting(30.0, lambda: files.exists(path), lambda: failed.append(left[0]))
    assert failed == [1, 0]
    refusing(monkeypatch, errno.ESTALE, path)
    with pytest.raises(OSError, match="Stale"):
        files.waiting(0.2, lambda: files.exists(path))


def test_schemes_that_nobody_knows_are_one_line():
    for path in ("foo://x", "S3://bucket/x"):
        with pytest.raises(UserError, match=f"^{path}: Protocol not known"):
            files.listdir(path)


def test_a_file_holds_no_names_and_home_is_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert files.listdir(str(tmp_path / "file" / "inside")) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.exists("~/file")
    files.write_bytes("~/new/file", b"1")
    assert (tmp_path / "new/file").read_bytes() == files.read_bytes("~/new/file") == b"1"
