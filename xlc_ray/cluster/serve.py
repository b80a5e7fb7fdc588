"""Serving stores over HTTP: in this process, or in one Ray actor on every node that has the data."""

from __future__ import annotations

import signal
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from xlc_ray.cluster.cli import Options
from xlc_ray.cluster.session import connect, run_path
from xlc_ray.config import UserError
from xlc_ray.serving.places import Terms

GIB = 1 << 30


def options(description: str | None) -> Options:
    """The options of `jobs/serve.py`."""
    found = Options(description)
    found.add_argument("--root", required=True, metavar="DIR", help="the folder whose datasets are served")
    found.add_argument("--host", help="address to listen at; 0.0.0.0: all (default: 127.0.0.1, this machine alone)")
    found.add_argument("--port", type=int, default=8000)
    found.add_argument("--token-env", metavar="NAME", help="environment variable with the token that clients must bear")
    found.add_argument("--max-chunk-bytes", type=int, default=8 * GIB, help="of an uploaded file (default: 8 GiB)")
    found.add_argument("--max-json-bytes", type=int, default=GIB // 8, help="of uploaded JSON (default: 128 MiB)")
    found.add_argument("--max-rows", type=int, default=1 << 18, help="of one slice (default: 262144)")
    found.add_argument(
        "--row-index", action="store_true", help="/manifest has a record a row, as crosslayer-coding reads"
    )
    found.add_argument("--nodes", metavar="RESOURCE", help="serve in a Ray actor on each node with it: CPU for all")
    return found


def serve(
    root: str,
    host: str | None,
    port: int,
    token_env: str | None,
    nodes: str | None,
    max_chunk_bytes: int,
    max_json_bytes: int,
    max_rows: int,
    row_index: bool,
) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UserError where the address, folder or token cannot be used."""
    found, root = _server(), run_path(root)
    token, terms = found.token_of(token_env), Terms(max_chunk_bytes, max_json_bytes, max_rows, row_index)
    if nodes:
        if host is not None:
            raise UserError(f"--host: {host}; with --nodes each actor listens at its node's own address")
        serving = serve_nodes(nodes, root, token, terms, port)
        print("\n".join(f"serving {root} at {url}" for url in serving.urls), flush=True)
        _until_told()
        serving.stop()
        return
    server, door = found.make_server(root, token, terms), found.listen(host or "127.0.0.1", port)
    print(f"serving {root} at {found.address(door)}{' (token needed)' if token else ''}", flush=True)
    server.run(sockets=[door])


def _server() -> Any:
    try:
        from xlc_ray.serving import server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install -e '.[serve]'") from None
    return server


def _until_told() -> None:
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    told.wait()


class Serving:
    """Actors that serve, one a node, as long as this is held; `urls` says where."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self.urls: list[str] = ray.get([actor.url.remote() for actor in actors])

    def stop(self) -> None:
        """End them all."""
        for actor in self._actors:
            ray.kill(actor)


def serve_nodes(resource: str, root: str, token: str | None, terms: Terms, port: int) -> Serving:
    """Serve `root`, a folder of each node's own, on every node that has some of `resource`. Ray starts an actor that
    dies again. Raises UserError."""
    connect()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]
    if not nodes:
        raise UserError(f"--nodes {resource}: no node of the cluster has this resource")
    where = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    actors = [
        ray.remote(_Server)
        .options(num_cpus=0, scheduling_strategy=place, max_restarts=-1, max_task_retries=-1)
        .remote(root, token, terms, host, port)
        for place, host in zip(where, [node["NodeManagerAddress"] for node in nodes], strict=True)
    ]
    return Serving(actors)


class _Server:
    """A server in a thread of an actor."""

    save = None
    """Once nnsight is imported, every object has a method of this name. Ray would send it along, and nnsight with it,
    after whose import there anyio cannot be imported."""

    def __init__(self, root: str, token: str | None, terms: Terms, host: str, port: int) -> None:
        self._running = _server().running(root, token, terms, host, port)
        self._url = self._running.__enter__()

    def url(self) -> str:
        """Where it is."""
        return self._url
