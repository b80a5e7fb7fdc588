"""Files at a local path or at any URL that fsspec knows: the same few verbs for both."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from xlc_ray.config import UserError

_PLACES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.EEXIST)
MENDABLE = (errno.ENOSPC, errno.EDQUOT, *_PLACES)
"""What a user can mend when a file cannot be written: a full disk, a place that must not be written or is none."""


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Make of a full disk, or of a place that cannot be written, a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        raise UserError(f"{path}: cannot be written: {os.strerror(error.errno)}; what was complete is kept") from None


def is_url(path: str) -> bool:
    """Whether the path names a remote or in-memory file system (`s3://…`, `memory://…`) rather than a local one."""
    return "://" in path and not path.startswith("file://")


def local(path: str) -> str:
    """A local path without its `file://`."""
    return path.removeprefix("file://")


def join(base: str, *parts: str) -> str:
    """Path or URL of something inside a directory."""
    return "/".join([base.rstrip("/"), *parts])


def name(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path within it."""
    return fsspec.core.url_to_fs(path)


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    fs, inner = filesystem(path)
    return fs.exists(inner)


def listdir(path: str) -> list[str]:
    """Names in a directory, sorted; empty where there is no such directory."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        found = fs.ls(inner, detail=False)
    except FileNotFoundError:
        return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)


def directories(path: str) -> list[str]:
    """Names of the directories in a directory, sorted; empty where there is no such directory."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        found = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    return sorted(name(entry["name"]) for entry in found if entry["type"] == "directory")


def makedirs(path: str) -> None:
    """Make a directory and those above it."""
    fs, inner = filesystem(path)
    with writing(path):
        fs.makedirs(inner, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file or a whole directory, if it is there."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def read_bytes(path: str) -> bytes:
    """The whole file."""
    fs, inner = filesystem(path)
    return fs.cat_file(inner)


def tail(path: str, size: int) -> bytes:
    """The last `size` bytes of a file, or all of a smaller one."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    end = fs.size(inner)
    return fs.cat_file(inner, start=max(0, end - size), end=end)


def modified(path: str) -> float:
    """When a file was last written, in seconds since 1970."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return fs.modified(inner).timestamp()


def read_json(path: str) -> Any:
    """The JSON in a file."""
    return json.loads(read_bytes(path))


def read_mapping(path: str) -> dict[str, Any]:
    """The JSON object in a file that must be there. Raises UserError naming it."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def write_bytes(path: str, data: bytes) -> None:
    """Write a file whole: readers see the old content or the new, never a part."""
    if is_url(path):  # object stores publish an object only when it is complete
        fs, inner = filesystem(path)
        fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(inner, data)
        return
    target = Path(local(path))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: str, value: Any) -> None:
    """Write a value as JSON, whole."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def append(path: str, text: str) -> None:
    """Add text to the end of a file; nothing before it is rewritten on a local disk."""
    fs, inner = filesystem(path)
    with writing(path):
        fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
        with fs.open(inner, "ab" if fs.exists(inner) else "wb") as file:
            file.write(text.encode())
