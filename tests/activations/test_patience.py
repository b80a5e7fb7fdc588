"""Reads of a local file system that fails for some time."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.activations import test_foreign as foreign
from tests.activations.build import make
from xlc_ray.activations import reading
from xlc_ray.activations.store import open_store
from xlc_ray.config import UserError


def test_reads_wait_for_a_file_system_that_comes_back(tmp_path):
    opened = dataclasses.replace(make(tmp_path / "store", [30, 20]), patience=30.0)
    want = opened.read(1, 0, 20, ["mlp_in.0"])
    reading._CHECKED.clear()
    (tmp_path / "store").rename(tmp_path / "away")
    back = threading.Timer(0.5, (tmp_path / "away").rename, [tmp_path / "store"])
    back.start()
    assert np.array_equal(opened.read(1, 0, 20, ["mlp_in.0"])["mlp_in.0"], want["mlp_in.0"])
    back.join()


@pytest.mark.parametrize(("patience", "said"), [(0.0, "missing$"), (0.3, r"missing \(tried for 0\.3 s\)")])
def test_reads_end_in_one_line_where_it_does_not(tmp_path, patience, said):
    opened = dataclasses.replace(make(tmp_path, [30]), patience=patience)
    (tmp_path / "chunk_0.hdf5").unlink()
    with pytest.raises(UserError, match=rf"chunk_0\.hdf5: the chunk is {said}"):
        opened.read(0, 0, 5, ["mlp_in.0"])


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_datasets_of_other_programs_are_waited_for_too(tmp_path, compression):
    values = foreign.write(tmp_path, compression=compression)
    opened = dataclasses.replace(open_store(str(tmp_path)), patience=30.0)

    def read(row: int) -> np.ndarray:
        return opened.read(0, row, row + 4, ["mlp_out.10"])["mlp_out.10"]

    read(0)
    for fd in Path("/proc/self/fd").iterdir():  # from here on the system refuses to read what is open
        if fd.exists() and fd.resolve() == tmp_path / "chunk_0.hdf5":
            with open(os.devnull, "wb") as refusing:
                os.dup2(refusing.fileno(), int(fd.name))
    assert np.array_equal(read(30), values[30:34, :, 1, 1])


def test_a_read_that_the_system_refuses_is_named_and_a_damaged_file_is_not_waited_for(tmp_path, monkeypatch):
    opened = dataclasses.replace(make(tmp_path, [30]), patience=3600.0)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", refuse)
        with pytest.raises(UserError, match=r"chunk_0\.hdf5: the chunk cannot be read: Input/output error"):
            dataclasses.replace(opened, patience=0.0).read(0, 0, 5, ["mlp_in.0"])
    (tmp_path / "chunk_0.hdf5").write_bytes(b"\0" * opened.manifest.chunks[0].bytes)
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        opened.read(0, 0, 5, ["mlp_in.0"])
