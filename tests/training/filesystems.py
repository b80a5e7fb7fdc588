"""File systems that misbehave where checkpoints are written: `held://` waits, `full://` has no room."""

from __future__ import annotations

import errno
import os
import threading

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Held(MemoryFileSystem):
    """Tensors of checkpoints are written once `released` is set."""

    protocol = "held"
    store: dict = {}  # noqa: RUF012 (a class attribute there, too)
    pseudo_dirs: list = [""]  # noqa: RUF012
    released = threading.Event()

    def _open(self, path, mode="rb", **options):
        if path.endswith(".distcp") and mode == "wb":
            assert self.released.wait(timeout=60)
        return super()._open(path, mode, **options)


class Full(MemoryFileSystem):
    """No room for the tensors of checkpoints whose path contains `refused`."""

    protocol = "full"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012
    refused = "nothing"

    def _open(self, path, mode="rb", **options):
        if self.refused in path and path.endswith(".distcp") and mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super()._open(path, mode, **options)


for kind in (Held, Full):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
