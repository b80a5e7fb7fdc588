"""Where things stand below the served folder: nothing that a client names lies outside, or hides what is inside.

A dataset is a directory, its id the directory's path below the root ("gpt2/pile_train"); a chunk is
`chunk_{i}.hdf5`, or `.h5` in older datasets. Of our own stores, exactly the files that a store has can be named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from xlc_ray.config import UserError

_PART = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}")  # no dot in front: "..", and uploads at work
_TOP = re.compile(r"(manifest|statistics|identity|metadata|norm_stats)\.json|index\.bin|chunk_\d{1,10}\.(hdf5|h5)")
_INNER = {
    "text": re.compile(r"plan\.json|chunk_\d{1,10}\.npz"),
    "moments": re.compile(r"chunk_\d{1,10}\.npz"),
    "records": re.compile(r"chunk_\d{1,10}\.json"),
}


@dataclass(frozen=True)
class Terms:
    """What is asked of requests. Raises UserError on bounds below 1."""

    chunk_bytes: int
    """At most, of an uploaded file."""
    json_bytes: int
    """At most, of uploaded JSON."""
    rows: int
    """At most, of a slice."""
    row_index: bool = False
    """Answer `/manifest` with a record a row, whichever the file has: the training client reads no other."""

    def __post_init__(self) -> None:
        for name in ("chunk_bytes", "json_bytes", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--max-{name.replace('_', '-')}: {getattr(self, name)} should be at least 1")


class Refusal(Exception):
    """What a client did wrong: an HTTP status and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Places:
    """Paths below `root`."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).resolve()

    def dataset(self, dataset_id: str) -> Path:
        """A dataset's directory, whether it is there or not. Raises Refusal on an id that is none."""
        parts = dataset_id.split("/")
        if not (len(parts) <= 8 and len(dataset_id.encode()) <= 800 and all(map(_may_be_directory, parts))):
            raise Refusal(422, "dataset id: names joined by /, each beginning with no dot and of no file of a store")
        return self._inside(self.root.joinpath(*parts))

    def file(self, path: str) -> Path:
        """A file of a store: "gpt2/pile_train/manifest.json". Raises Refusal on a name that no store has."""
        *parts, name = path.split("/")
        directory = parts.pop() if parts and parts[-1] in _INNER else None
        known = _INNER[directory] if directory else _TOP
        if not (parts and known.fullmatch(name)):
            raise Refusal(404, "no file of a store has this name")
        return self._inside(self.dataset("/".join(parts)) / (directory or "") / name)

    def names(self, path: str) -> list[str]:
        """Files of a store, or of one of its directories (`…/records`), sorted; empty where there are none."""
        *parts, last = path.split("/")
        directory = self.dataset("/".join(parts)) / last if parts and last in _INNER else self.dataset(path)
        known = _INNER[last] if parts and last in _INNER else _TOP
        try:
            return sorted(p.name for p in self._inside(directory).iterdir() if known.fullmatch(p.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def chunk(self, dataset_id: str, index: int) -> Path:
        """A chunk file that is there. Raises Refusal (404) where it is not."""
        directory = self.dataset(dataset_id)
        for name in (f"chunk_{index}.hdf5", f"chunk_{index}.h5"):
            path = self._inside(directory / name)
            if path.is_file():
                return path
        raise Refusal(404, f"chunk {index} is not there")

    def _inside(self, path: Path) -> Path:
        if not path.resolve().is_relative_to(self.root):  # by a link
            raise Refusal(404, "not there")
        return path


def _may_be_directory(part: str) -> bool:
    # A directory of the name of a store's file would stand in that file's way.
    return bool(_PART.fullmatch(part)) and part not in _INNER and not _TOP.fullmatch(part) and _encodes(part)


def _encodes(part: str) -> bool:
    try:
        return len(part.encode()) <= 200
    except UnicodeEncodeError:
        return False
