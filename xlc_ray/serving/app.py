"""The routes. A request that is refused gets a status and one line: {"detail": "…"}.

/api/v1/health and /datasets/{id}/… are those of crosslayer-coding's server. An id is a directory below the root,
percent-encoded as one segment or not. Ours beside them, for stores that know more than that protocol: `?sites=` of a
slice, and the files of a store: /files/{id}/{name} (byte ranges; put; removed), /size/…, /checksum/…, /list/{id}.
"""

from __future__ import annotations

import errno
import hmac
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from xlc_ray.activations.chunkfile import checksum
from xlc_ray.serving import uploads
from xlc_ray.serving.places import Places, Refusal, Terms
from xlc_ray.serving.slices import Slice, layout_of
from xlc_ray.serving.transfer import chunk_index, row_index, whole_or_range

OCTETS, JSON = "application/octet-stream", "application/json"
Id = Annotated[str, InPath(description="directory of the dataset below the root")]
Name = Annotated[str, InPath(description="a file of a store, below the root")]
Index = Annotated[int, InPath(ge=0, lt=2**31)]
Chunk = Annotated[int, Query(ge=0, lt=2**31)]
Sites = Annotated[str | None, Query(description="a,b,…; without: inputs, then targets, of each layer")]
Tokens = Annotated[int | None, Header(description="as its sender counts them; the file itself is what counts")]
_ROWS = {
    "type": "object",
    "required": ["rows"],
    "properties": {"rows": {"type": "array", "items": {"type": "integer"}}},
}

_PARSING = threading.Lock()
"""What is parsed takes several times its bytes: one at a time."""


def make_app(root: str, token: str | None, terms: Terms) -> FastAPI:
    """The server of a folder. `token`: what clients must bear; None: nothing."""
    places = Places(root)
    app = FastAPI(title="xlc_ray activation server", docs_url=None, redoc_url=None)
    guarded = APIRouter(dependencies=[Depends(_guard(token))])
    _add_reading(guarded, places, terms)
    _add_uploads(guarded, places, terms)
    _add_files(guarded, places, terms)

    @app.get("/api/v1/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(guarded)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(OSError, _unwritten)
    app.add_exception_handler(ClientDisconnect, _gone)
    return app


def _guard(token: str | None) -> Callable[[Request], Awaitable[None]]:
    wanted = f"Bearer {token}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token is not None and not hmac.compare_digest(given, wanted):
            raise Refusal(401, "needs the header Authorization: Bearer TOKEN")

    return check


def _add_reading(routes: APIRouter, places: Places, terms: Terms) -> None:
    @routes.post("/datasets/{dataset_id:path}/slice", openapi_extra=_takes(JSON, _ROWS))
    async def slice_of(dataset_id: Id, request: Request, chunk: Chunk, sites: Sites = None) -> Response:
        rows = _rows(await uploads.Body(request, 64 + 16 * terms.rows).whole(), terms.rows)
        path = places.chunk(dataset_id, chunk)
        found = await to_thread.run_sync(Slice, path, rows, None if sites is None else sites.split(","))
        return StreamingResponse(iter(found), media_type=OCTETS, headers={"Content-Length": str(found.length)})

    @routes.get("/datasets/{dataset_id:path}/info")
    def info(dataset_id: Id, request: Request) -> Response:
        return whole_or_range(places.dataset(dataset_id) / "metadata.json", request, JSON)

    @routes.get("/datasets/{dataset_id:path}/norm_stats")
    def norm_stats(dataset_id: Id, request: Request) -> Response:
        return whole_or_range(places.dataset(dataset_id) / "norm_stats.json", request, JSON)

    @routes.get("/datasets/{dataset_id:path}/manifest")
    def manifest(dataset_id: Id, request: Request) -> Response:
        path = places.dataset(dataset_id) / "index.bin"
        chunks = chunk_index(path) if terms.row_index else None
        return whole_or_range(path, request, OCTETS) if chunks is None else row_index(chunks)


def _add_uploads(routes: APIRouter, places: Places, terms: Terms) -> None:
    @routes.post("/datasets/{dataset_id:path}/chunks/{index}", status_code=201, openapi_extra=_form("chunk_file"))
    async def chunk(dataset_id: Id, index: Index, request: Request, x_num_tokens: Tokens = None) -> dict[str, str]:
        target = _open(places.dataset(dataset_id)) / f"chunk_{index}.hdf5"
        blocks = uploads.multipart_file(request, "chunk_file", terms.chunk_bytes)
        async with uploads.received(blocks, target) as partial:
            await to_thread.run_sync(_check_chunk, partial)
            uploads.put(partial, target)
            target.with_suffix(".h5").unlink(missing_ok=True)
        return {"status": "ok"}

    @routes.post("/datasets/{dataset_id:path}/manifest", status_code=201, openapi_extra=_form("manifest_file"))
    async def manifest(dataset_id: Id, request: Request) -> dict[str, str]:
        target = _open(places.dataset(dataset_id)) / "index.bin"
        blocks = uploads.multipart_file(request, "manifest_file", terms.json_bytes)
        async with uploads.received(blocks, target) as partial:
            size = partial.stat().st_size
            if not size or size % 8:
                raise Refusal(422, f"{size} bytes are no index of 8 bytes a row or 16 a chunk")
            uploads.put(partial, target)
        return {"status": "ok"}

    @routes.post(
        "/datasets/{dataset_id:path}/metadata", status_code=201, openapi_extra=_takes(JSON, {"type": "object"})
    )
    async def metadata(dataset_id: Id, request: Request) -> dict[str, str]:
        return await _put_json(request, _open(places.dataset(dataset_id)) / "metadata.json", terms)

    @routes.post(
        "/datasets/{dataset_id:path}/norm_stats", status_code=201, openapi_extra=_takes(JSON, {"type": "object"})
    )
    async def norm_stats(dataset_id: Id, request: Request) -> dict[str, str]:
        return await _put_json(request, _open(places.dataset(dataset_id)) / "norm_stats.json", terms)


def _add_files(routes: APIRouter, places: Places, terms: Terms) -> None:
    @routes.get("/files/{path:path}")
    @routes.head("/files/{path:path}")
    def content(path: Name, request: Request) -> Response:
        return whole_or_range(places.file(path), request, OCTETS)

    @routes.put("/files/{path:path}", status_code=201, openapi_extra=_takes(OCTETS, {"type": "string"}))
    async def put(path: Name, request: Request) -> dict[str, str]:
        target = places.file(path)
        if target.suffix == ".json":
            return await _put_json(request, target, terms)
        async with uploads.received(aiter(uploads.Body(request, terms.chunk_bytes)), target) as partial:
            if target.suffix in (".hdf5", ".h5"):
                await to_thread.run_sync(_check_chunk, partial)
            uploads.put(partial, target)
        return {"status": "ok"}

    @routes.delete("/files/{path:path}")
    def remove(path: Name) -> dict[str, str]:
        _there(places.file(path)).unlink(missing_ok=True)
        return {"status": "ok"}

    @routes.get("/size/{path:path}")
    def size(path: Name) -> dict[str, int]:
        return {"size": _there(places.file(path)).stat().st_size}

    @routes.get("/checksum/{path:path}")
    def xxh3(path: Name) -> dict[str, str]:
        return {"xxh3": checksum(str(_there(places.file(path))))}

    @routes.get("/list/{path:path}")
    def names(path: Annotated[str, InPath()]) -> dict[str, list[str]]:
        return {"names": places.names(path)}


def _open(dataset: Path) -> Path:
    """A dataset that takes uploads by crosslayer-coding's routes."""
    if (dataset / "manifest.json").exists():
        raise Refusal(409, "a complete store of xlc_ray, whose manifest knows its chunks; upload to another id")
    return dataset


def _there(path: Path) -> Path:
    if not path.is_file():
        raise Refusal(404, f"{path.name} is not there")
    return path


async def _put_json(request: Request, target: Path, terms: Terms) -> dict[str, str]:
    async with uploads.received(aiter(uploads.Body(request, terms.json_bytes)), target) as partial:
        await to_thread.run_sync(_check_object, partial)
        uploads.put(partial, target)
    return {"status": "ok"}


def _check_object(partial: Path) -> None:
    with _PARSING:
        if not isinstance(_parse(partial.read_bytes()), dict):
            raise Refusal(422, "expected a JSON object")


def _check_chunk(partial: Path) -> None:
    with partial.open("rb") as file:
        layout_of(file)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"not JSON: {str(error)[:200]}") from None


def _rows(raw: bytes, most: int) -> list[int]:
    body = _parse(raw)
    rows = body.get("rows") if isinstance(body, dict) else None
    if not isinstance(rows, list) or any(type(row) is not int for row in rows):
        raise Refusal(422, 'expected {"rows": [whole numbers]}')
    if not rows:
        raise Refusal(400, "rows: none are asked for")
    if len(rows) > most:
        raise Refusal(422, f"rows: {len(rows)} of them; at most {most} at a time")
    return rows


def _takes(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


def _form(field: str) -> dict[str, Any]:
    content = {"type": "string", "format": "binary"}
    return _takes("multipart/form-data", {"type": "object", "required": [field], "properties": {field: content}})


def _says(status: int, line: str) -> JSONResponse:
    # What is left of a refused body is not read: its connection ends with the answer.
    headers = {"Connection": "close"} if status in (401, 413) else {}
    return JSONResponse({"detail": line}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _says(error.status, error.line)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _says(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


async def _unwritten(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _says(507, "the disk is full")
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG):
        return _says(409, "something of another kind has this name")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return _says(409, "the server may not do that in its folder")
    raise error


async def _gone(request: Request, error: Exception) -> Response:
    return _says(400, "the client left")
