"""A stand-in for what the Hub answers to an upload, on loopback: it keeps the files that a commit names."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"


class Server(ThreadingHTTPServer):
    """`files`: what was committed; large ones come first by the LFS protocol, and must have the promised hash."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository: str | None = None
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.path.startswith("/api/whoami-v2"):
            self.answer({"name": "me", "type": "user"} if known else {"error": "Invalid token"}, 200 if known else 401)
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        blob, name = self.body(), self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(blob).hexdigest() == name
        self.server.blobs[name] = blob
        self.answer({})

    def do_POST(self) -> None:
        server, body = self.server, self.body()
        if self.path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{server.address}/blobs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            server.repository = f"{wanted.get('organization', 'me')}/{wanted['name']}"
            self.answer({"url": f"{server.address}/{server.repository}"})
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{server.repository}/preupload/main":
            kinds = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": [{**kind, "shouldIgnore": False} for kind in kinds]})
        elif self.path == f"/api/models/{server.repository}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def commit(self, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.address}/{self.server.repository}/commit/c0ffee"
        self.answer({"commitOid": "c0ffee", "commitUrl": url, "pullRequestUrl": None})


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
