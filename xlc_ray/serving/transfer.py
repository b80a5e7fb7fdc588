"""A file as a reply, whole or a range of its bytes, from one open file: what replaces it meanwhile does not mix in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from xlc_ray.activations.foreign import INDEX_RECORD
from xlc_ray.serving.places import Refusal
from xlc_ray.serving.slices import PIECE

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def whole_or_range(path: Path, request: Request, kind: str) -> Response:
    """The file, or the one range that the header Range names (status 206). Raises Refusal: 404, 416."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Refusal(404, f"{path.name} is not there") from None
    size = os.fstat(file.fileno()).st_size
    span = _range(request.headers.get("range"), size)
    if isinstance(span, int):
        file.close()
        raise Refusal(span, f"{path.name} has {size} bytes")
    start, stop = span or (0, size)
    headers = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
    if span:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    if request.method == "HEAD":
        file.close()
        return Response(headers=headers, media_type=kind)
    pieces = _pieces(file, start, stop)
    return StreamingResponse(pieces, 206 if span else 200, headers=headers, media_type=kind)


def chunk_index(path: Path) -> np.ndarray | None:
    """The records of an index.bin with one a chunk; None where it has one a row, or is not there."""
    try:
        total = json.loads((path.parent / "metadata.json").read_bytes())["total_tokens"]
        records = np.fromfile(path, INDEX_RECORD) if path.stat().st_size % INDEX_RECORD.itemsize == 0 else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    fits = (
        records is not None and records["num_tokens"].sum(dtype=np.int64) == total and (records["num_tokens"] > 0).all()
    )
    return records if fits else None


def row_index(chunks: np.ndarray) -> Response:
    """The same as records of two uint32, (chunk, row), one a row."""

    def pieces() -> Iterator[bytes]:
        for chunk, rows in zip(chunks["chunk_id"].tolist(), chunks["num_tokens"].tolist(), strict=True):
            for start in range(0, rows, PIECE // 8):
                row = np.arange(start, min(start + PIECE // 8, rows), dtype="<u4")
                yield np.stack([np.full_like(row, chunk), row], axis=1).tobytes()

    length = 8 * int(chunks["num_tokens"].sum(dtype=np.int64))
    return StreamingResponse(pieces(), headers={"Content-Length": str(length)}, media_type="application/octet-stream")


def _range(header: str | None, size: int) -> tuple[int, int] | int | None:
    """(start, stop); None for all of it, as also where the header is of a form that may be ignored; 416."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(int(last) + 1, size) if first and last else size
    return (start, stop) if start < stop else 416


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    with file:
        while start < stop:
            piece = os.pread(file.fileno(), min(PIECE, stop - start), start)
            if not piece:
                return  # cut under our hands: the reply falls short of its length, which the client sees
            start += len(piece)
            yield piece
