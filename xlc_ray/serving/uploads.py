"""Request bodies → files: streamed to a partial file beside the target, checked, then put in its place whole.

So neither memory nor another disk holds a body, readers see the old file or the new, and what a client breaks off, or
what is refused, leaves nothing behind.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from anyio import to_thread
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from xlc_ray.serving.places import Refusal

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PARTIAL = ".upload_"
_STALE_SECONDS = 3600  # a partial file that nobody wrote to for so long is of a server that was killed
_BLOCK = 1 << 18  # bytes gathered for one write
_OVERHEAD = 1 << 16  # of a multipart body: boundaries and headers


class Body:
    """A request's body with a limit, block by block. Raises Refusal (413) beyond it."""

    def __init__(self, request: Request, limit: int) -> None:
        self._request, self._limit = request, limit
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise Refusal(413, f"the body has {length} bytes; at most {limit} are taken")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for block in self._request.stream():
            size += len(block)
            if size > self._limit:
                raise Refusal(413, f"the body has more than {self._limit} bytes")
            yield block

    async def whole(self) -> bytes:
        """All of it, in memory: for small terms."""
        return b"".join([block async for block in self])


async def multipart_file(request: Request, field: str, limit: int) -> AsyncIterator[bytes]:
    """The content of the form's file `field`. Raises Refusal on a body that is cut or no such form."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refusal(422, f"expected multipart/form-data with a file {field}")
    form = _Form(field)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks)
        async for block in Body(request, limit + _OVERHEAD):
            parser.write(block)
            for data in form.take():
                yield data
    except MultipartParseError as error:
        raise Refusal(422, f"the form is malformed: {str(error)[:200]}") from None
    if not form.ended:
        raise Refusal(422, "the form is cut")
    if not form.found:
        raise Refusal(422, f"the form has no file {field}")


class _Form:
    """What the parser of a form tells, of which the content of one field is kept until it is taken."""

    def __init__(self, field: str) -> None:
        self.field, self.found, self.ended = field.encode(), False, False
        self._inside, self._name, self._value, self._data = False, b"", b"", []
        self.callbacks: MultipartCallbacks = {
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def take(self) -> list[bytes]:
        taken, self._data = self._data, []
        return taken

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if len(self._name) + len(self._value) > _OVERHEAD:  # python-multipart has a limit only since some version
            raise Refusal(413, f"a header of the form has more than {_OVERHEAD} bytes")

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition" and not self.found:
            self._inside = parse_options_header(self._value)[1].get(b"name") == self.field
            self.found = self._inside
        self._name = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._inside:
            self._data.append(data[start:end])

    def _part_end(self) -> None:
        self._inside = False

    def _end(self) -> None:
        self.ended = True


@asynccontextmanager
async def received(blocks: AsyncIterator[bytes], target: Path) -> AsyncIterator[Path]:
    """A partial file that holds all blocks, beside `target`. `put` it there; otherwise it goes when this ends."""
    partial = target.with_name(f"{PARTIAL}{uuid.uuid4().hex}.part")
    file = await to_thread.run_sync(_create, partial)
    try:
        try:
            waiting, size = [], 0
            async for block in blocks:
                waiting.append(block)
                size += len(block)
                if size >= _BLOCK:
                    await to_thread.run_sync(file.write, b"".join(waiting))
                    waiting, size = [], 0
            await to_thread.run_sync(_finish, file, b"".join(waiting))
        finally:
            file.close()
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _create(partial: Path) -> BinaryIO:
    partial.parent.mkdir(parents=True, exist_ok=True)
    return partial.open("xb")


def _finish(file: BinaryIO, rest: bytes) -> None:
    file.write(rest)
    file.flush()
    os.fsync(file.fileno())


def put(partial: Path, target: Path) -> None:
    """Give a partial file its name. Whoever reads the old file goes on reading it."""
    partial.replace(target)


def sweep(root: Path) -> None:
    """Remove what servers that were killed left of uploads."""
    for partial in root.rglob(f"{PARTIAL}*.part"):
        if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
            partial.unlink(missing_ok=True)
