"""Blocks of remote files on a local disk, at most so many bytes, the longest unused going first.

Any number of processes share a directory. A block is a file `xx/{hash}` whose modification time is its last use;
`total` holds the bytes of all, and changes only under the lock, as do blocks. What a crash leaves (a cut block, a wrong
total) is found: a block of another length counts as missing, and every eviction counts anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xlc_ray import files

BLOCK = 1 << 18
"""Bytes of a block: a few slices of rows at one site."""
_KEPT = 0.9  # of the bound, after an eviction: so that the next one is far


@dataclass(frozen=True)
class DiskCache:
    """Blocks below `path`, `max_bytes` of them at most. Raises UserError where the disk cannot be written."""

    path: str
    max_bytes: int

    def get(self, key: str, size: int) -> bytes | None:
        """The block of this key and size; None where it is not kept."""
        place = self._place(key)
        try:
            data = place.read_bytes()
            if len(data) == size:
                os.utime(place)
                return data
        except OSError:  # not there; of a path that cannot be read `put` tells
            pass
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep a block, after evicting what must go for it."""
        if len(data) > self.max_bytes:
            return
        place = self._place(key)
        with files.writing(self.path), self._locked() as total_file:
            before = _size(place)
            total = _read(total_file) - before
            if total + len(data) > self.max_bytes:
                place.unlink(missing_ok=True)
                total = self._evict(min(int(self.max_bytes * _KEPT), self.max_bytes - len(data)))
            _write(total_file, total + len(data))  # first: a crash in between errs on the side of too little
            place.parent.mkdir(exist_ok=True)
            partial = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.part")
            try:
                partial.write_bytes(data)
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)

    def _evict(self, bound: int) -> int:
        """Remove blocks, longest unused first, until at most `bound` bytes are left; how many are."""
        found = []
        for place in Path(self.path).glob("??/*"):
            status = place.stat()
            if place.suffix == ".part":  # all writers hold the lock: this one was killed
                place.unlink()
            else:
                found.append((status.st_mtime_ns, status.st_size, place))
        total = sum(size for _, size, _ in found)
        for _, size, place in sorted(found, key=lambda block: block[0]):
            if total <= bound:
                break
            place.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self) -> Iterator[int]:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        total_file = os.open(Path(self.path) / "total", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(total_file, fcntl.LOCK_EX)
            yield total_file
        finally:
            os.close(total_file)

    def _place(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return Path(self.path) / name[:2] / name


def _size(place: Path) -> int:
    try:
        return place.stat().st_size
    except FileNotFoundError:
        return 0


def _read(total_file: int) -> int:
    raw = os.pread(total_file, 32, 0)
    return int(raw) if raw else 0


def _write(total_file: int, total: int) -> None:
    os.pwrite(total_file, f"{total:032d}".encode(), 0)
