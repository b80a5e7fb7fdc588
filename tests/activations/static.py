"""A static web server with byte ranges, and faults on demand, in a thread."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Static(ThreadingHTTPServer):
    """`asked`: (method, path, range) of each request. `fault(n, path)` names what goes wrong with the n-th: a status,
    "cut" (half of the body), "drop" (no answer), or None."""

    def __init__(self, root: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked = root, []
        self.lock = threading.Lock()
        self.fault = lambda n, path: None
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Static
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            n = len(server.asked)
            server.asked.append((self.command, path, self.headers.get("Range")))
        fault = server.fault(n, path)
        if fault == "drop":
            self.close_connection = True
            return
        name = server.root + path
        if isinstance(fault, int) or not os.path.isfile(name):
            self.answer(fault or 404, b"", None)
            return
        with open(name, "rb") as file:
            data = file.read()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "") if server.ranges else None
        if match:
            data = data[int(match[1]) : int(match[2]) + 1]
        self.answer(206 if match else 200, data, fault)

    def answer(self, status: int, data: bytes, fault: object) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"


@contextmanager
def serve(root: str) -> Iterator[Static]:
    server = Static(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
