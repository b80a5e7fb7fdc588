"""Our activation server seen from a client: requests that are repeated, and its files as an fsspec file system.

`xlc+http://[TOKEN_ENV@]host:port/dataset/id` names a store there (`xlc+https` likewise). TOKEN_ENV is the name of the
environment variable that holds the bearer token; a URL never holds the token itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3
from fsspec import AbstractFileSystem, register_implementation

from xlc_ray.config import Unreachable, UserError

SCHEMES = ("xlc+http", "xlc+https")
_INSIDE = ("text", "moments", "records")  # directories of a store
_FILES = (".json", ".bin", ".hdf5", ".h5", ".npz")  # endings of its files
ATTEMPTS = 6
FIRST_DELAY = 0.5
LONGEST_DELAY = 8.0
_CONNECTIONS = 16
_TIMEOUT = urllib3.Timeout(connect=10.0, read=120.0)
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})


class Web:
    """Requests to one server. All that we ask can be asked twice, so all of it is."""

    def __init__(self, base: str, token_env: str | None) -> None:
        self.base, self.token_env = base, token_env

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """The body of the answer. Raises FileNotFoundError (404), and UserError on all else that is no success."""
        headers = (headers or {}) | self._authority()
        url = self.base + path
        retries = urllib3.Retry(
            total=ATTEMPTS - 1,
            backoff_factor=FIRST_DELAY,
            backoff_max=LONGEST_DELAY,
            backoff_jitter=FIRST_DELAY / 2,
            status_forcelist=_AGAIN,
            allowed_methods=None,
            raise_on_status=False,
        )
        try:
            answer = _pool().request(method, url, body=body, headers=headers, retries=retries, timeout=_TIMEOUT)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(f"{url}: no answer after {ATTEMPTS} attempts: {reason}") from None
        if answer.status == 404:
            raise FileNotFoundError(url)
        if answer.status in (401, 403):
            known = (
                f"in the environment variable {self.token_env}" if self.token_env else "(source.token_env is not set)"
            )
            raise UserError(f"{url}: refused ({answer.status}): {_detail(answer.data)}; the token {known}")
        if answer.status >= 400:
            raise UserError(f"{url}: refused ({answer.status}): {_detail(answer.data)}")
        return answer.data

    def _authority(self) -> dict[str, str]:
        if self.token_env is None:
            return {}
        if not (token := os.environ.get(self.token_env)):
            raise UserError(f"source.token_env: the environment variable {self.token_env} is not set")
        return {"Authorization": f"Bearer {token}"}


def _detail(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return repr(body[:100])


@lru_cache(maxsize=1)
def _pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=_CONNECTIONS)


class ServedFileSystem(AbstractFileSystem):
    """Files of stores on our server: read whole or by ranges, written whole, listed, removed."""

    protocol = SCHEMES
    root_marker = ""

    def __init__(self, base: str, token_env: str | None = None, **options: Any) -> None:
        super().__init__(base=base, token_env=token_env, **options)
        self.web = Web(base, token_env)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        parts = urlsplit(path)
        token_env, _, host = parts.netloc.rpartition("@")
        return {"base": f"{parts.scheme.removeprefix('xlc+')}://{host}", "token_env": token_env or None}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return (urlsplit(path).path if path.startswith(SCHEMES) else path).strip("/")

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """Names in a store, or in a directory of it; none where there is nothing."""
        answer = self.web.ask("GET", f"/list/{quote(path)}")
        names = [f"{path}/{name}" for name in json.loads(answer)["names"]]
        return [{"name": name, "size": None, "type": "file"} for name in names] if detail else names

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Name and size of a file. Raises FileNotFoundError."""
        size = json.loads(self.web.ask("GET", f"/size/{quote(path)}"))["size"]
        return {"name": path, "size": size, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """A file, or bytes start … end-1 of it."""
        asked = (
            {} if start is None and end is None else {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"}
        )
        return self.web.ask("GET", f"/files/{quote(path)}", headers=asked)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Write a file, whole."""
        self.web.ask("PUT", f"/files/{quote(path)}", value)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, mode: str = "overwrite", **options: Any) -> None:
        """Send a local file, a piece at a time."""
        with open(lpath, "rb") as file:
            self.web.ask(
                "PUT", f"/files/{quote(rpath)}", file, {"Content-Length": str(os.fstat(file.fileno()).st_size)}
            )

    def isdir(self, path: str) -> bool:
        """Whether it is a store, or a directory of one, that has files."""
        return not path.endswith(_FILES) and any(self.ls(inner, detail=False) for inner in _directories(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove a file, or all files of a store or of a directory of one; what else is there is not a client's."""
        inside = _directories(path) if recursive and not path.endswith(_FILES) else ()
        for file in [file for inner in inside for file in self.ls(inner, detail=False)] if inside else [path]:
            self.web.ask("DELETE", f"/files/{quote(file)}")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the server makes directories as files come."""

    def xxh3(self, path: str) -> str:
        """XXH3 of a file, taken by the server."""
        return json.loads(self.web.ask("GET", f"/checksum/{quote(path)}"))["xxh3"]

    def slice(self, dataset: str, chunk: int, rows: Iterable[int], sites: Iterable[str] | None) -> bytes:
        """Rows (ascending) of a chunk: of each of `sites`, or, where None, of inputs and targets of each layer."""
        query = f"?chunk={chunk}" + ("" if sites is None else f"&sites={quote(','.join(sites))}")
        body = json.dumps({"rows": list(rows)}).encode()
        return self.web.ask("POST", f"{self.route(dataset)}/slice{query}", body, {"Content-Type": "application/json"})

    def route(self, dataset: str) -> str:
        """Path of a dataset in crosslayer-coding's protocol: its id is one segment."""
        return f"/datasets/{quote(dataset, safe='')}"


def _directories(path: str) -> list[str]:
    """Where the files of a store are; a directory of one is alone."""
    inside = path.rsplit("/", 1)[-1] in _INSIDE
    return [path] if inside else [*(f"{path}/{name}" for name in _INSIDE), path]


for _scheme in SCHEMES:
    register_implementation(_scheme, ServedFileSystem)
