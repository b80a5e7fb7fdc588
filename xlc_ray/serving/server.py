"""uvicorn around the routes: in this thread until it is told to stop, or in one of its own."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.serving import uploads
from xlc_ray.serving.app import make_app
from xlc_ray.serving.places import Terms

_CLIENTS = 1024  # connections at once; more get 503, on which clients try again


def token_of(name: str | None) -> str | None:
    """The token in an environment variable. Raises UserError where it is named but not set."""
    if name is None:
        return None
    if not (token := os.environ.get(name)):
        raise UserError(f"--token-env: the environment variable {name} is not set")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: a free one). Raises UserError where the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen: {error}") from None


def make_server(root: str, token: str | None, terms: Terms) -> uvicorn.Server:
    """A server of the local folder `root`, which is made if need be. Raises UserError where it cannot be."""
    if files.is_url(root):
        raise UserError(f"--root {root}: allowed: a local folder")
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root {root}: {error.strerror}") from None
    uploads.sweep(Path(root))
    app = make_app(root, token, terms)
    config = uvicorn.Config(app, log_level="warning", access_log=False, limit_concurrency=_CLIENTS, lifespan="off")
    return uvicorn.Server(config)


@contextmanager
def running(root: str, token: str | None, terms: Terms, host: str, port: int) -> Iterator[str]:
    """A server in a thread of its own; its URL. It ends with the context."""
    server, door = make_server(root, token, terms), listen(host, port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    try:
        yield address(door)
    finally:
        server.should_exit = True
        thread.join()


def address(door: socket.socket) -> str:
    """URL of a listening socket."""
    host, port = door.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
