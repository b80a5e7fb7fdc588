"""Files at a local path or at any URL that fsspec knows: the same few verbs for both.

What fails on the way to a URL and may pass is tried again with growing delays (`again`), and ends in a UserError. Where
a local file system fails there is an OSError; who can wait calls by way of `waiting`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from xlc_ray import web
from xlc_ray.config import Unreachable, UserError

T = TypeVar("T")

_PLACES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.EEXIST)
MENDABLE = (errno.ENOSPC, errno.EDQUOT, *_PLACES)
"""What a user can mend when a file cannot be written: a full disk, a place that must not be written or is none."""
COPIED_AT_ONCE = 2**24
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between calls of a local file system that fails
_OBJECTS = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs")
_LIBRARIES = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",
    "gcsfs.retry": "HttpError",
}
"""What libraries below fsspec raise that is no OSError."""
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "UnsupportedProtocol")


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
    """A local path without its `file://`, and with the home directory in place of `~`."""
    return os.path.expanduser(path.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """Path or URL of something inside a directory."""
    return "/".join([base.rstrip("/"), *parts])


def name(path: str) -> str:
    """The last part of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path within it. Raises UserError where none is known or installed."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: {error}") from None


def again(path: str, call: Callable[[], T]) -> T:
    """`call()`; at a URL tried again, with growing delays, while it fails in a way that may pass.

    FileNotFoundError goes on to the caller. Raises UserError, naming `path`, when patience ends or nothing will help.
    """
    if not is_url(path):
        return call()
    for attempt in range(1, web.ATTEMPTS + 1):
        try:
            return call()
        except FileNotFoundError:
            raise
        except failures() as error:
            if not may_pass(error):
                raise UserError(f"{path}: cannot be used: {said(error)}") from None
            if attempt == web.ATTEMPTS:
                raise Unreachable(f"{path}: no answer after {attempt} attempts: {said(error)}") from None
            delay = min(web.FIRST_DELAY * 2 ** (attempt - 1), web.LONGEST_DELAY)
        time.sleep(delay * random.uniform(0.75, 1.25))
    raise AssertionError("the last attempt returns or raises")


def waiting(patience: float, call: Callable[[], T], failed: Callable[[], object] = lambda: None) -> T:
    """`call()`; after an OSError `failed()`, a pause, and again, for so many seconds before the OSError is raised."""
    until, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return call()
        except OSError:
            failed()
            if time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def failures() -> tuple[type[BaseException], ...]:
    """Exceptions by which file systems report that something failed on the way."""
    loaded = [(sys.modules.get(module), name) for module, name in _LIBRARIES.items()]
    return (OSError, asyncio.TimeoutError, *(getattr(module, name) for module, name in loaded if module))


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help: not where the answer was a clear no."""
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return not (refused or isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES)


def said(error: BaseException) -> str:
    """What an exception says, and its type where it says nothing."""
    return f"{type(error).__name__} {error}".strip()


def exists(path: str) -> bool:
    """Whether there is a file or directory. Raises UserError where this user must not know."""
    try:
        return size(path) is not None if is_url(path) else bool(os.stat(local(path)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise UserError(f"{path}: cannot be looked for: {error.strerror}") from None


def size(path: str) -> int | None:
    """Bytes of a file or object (a directory: any number); None where there is none."""
    fs, inner = filesystem(path)

    def ask() -> int:
        fs.invalidate_cache()
        plain = fs.protocol == ("http", "https")  # to its `info`, all failures are 404
        if plain and not fs.exists(inner, strict=True):
            raise FileNotFoundError(path)
        return fs.info(inner)["size"] or 0

    try:
        return again(path, ask)
    except FileNotFoundError:
        return None


def listdir(path: str) -> list[str]:
    """Names in a directory, sorted; empty where there is no such directory."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        found = again(path, lambda: fs.ls(inner, detail=False))
    except (FileNotFoundError, NotADirectoryError):
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


def sizes(path: str) -> dict[str, int]:
    """Bytes of each file in a directory, by name; empty where there is no such directory."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    try:
        found = again(path, lambda: fs.ls(inner, detail=True))
    except FileNotFoundError:
        return {}
    return {name(entry["name"]): entry["size"] for entry in found if entry["type"] == "file"}


def makedirs(path: str) -> None:
    """Make a directory and those above it. Object stores have none, and would make a bucket: nothing is made there."""
    fs, inner = filesystem(path)
    if path.partition("://")[0] not in _OBJECTS:
        with writing(path):
            again(path, lambda: fs.makedirs(inner, exist_ok=True))


def remove(path: str) -> None:
    """Remove a file or a whole directory, if it is there."""
    fs, inner = filesystem(path)
    if exists(path) or fs.isdir(inner):
        again(path, lambda: fs.rm(inner, recursive=True))


def read_bytes(path: str) -> bytes:
    """The whole file."""
    fs, inner = filesystem(path)
    return again(path, lambda: fs.cat_file(inner))


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
        makedirs(path.rsplit("/", 1)[0])
        _write_there(path, lambda: fs.pipe_file(inner, data))
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


def send(source: Path, path: str) -> None:
    """Write a local file to a URL, whole."""
    fs, inner = filesystem(path)
    makedirs(path.rsplit("/", 1)[0])
    _write_there(path, lambda: fs.put_file(str(source), inner))


def _write_there(path: str, write: Callable[[], None]) -> None:
    try:
        again(path, write)
    except FileNotFoundError as error:  # no such bucket
        raise UserError(f"{path}: cannot be written: {said(error)}") from None


def copy(source: str, path: str) -> None:
    """Copy a file to another place of the same file system. It is on the disk before this returns."""
    fs, inner = filesystem(path)
    if is_url(path):
        _write_there(path, lambda: fs.cp_file(filesystem(source)[1], inner))
        return
    with open(local(source), "rb") as old, writing(path), open(local(path), "wb") as new:
        shutil.copyfileobj(old, new, COPIED_AT_ONCE)
        new.flush()
        os.fsync(new.fileno())


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
