"""64 clients of the activation server at once: uploads that replace each other's chunks, slices, and nonsense.

A chunk of version v holds base ^ v, so that a slice tells which version it is of, and whether all its rows are. Prints
and writes (--json FILE) what was done, what was wrong, and the memory of the server's process.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import requests

ROOT = Path(__file__).parents[2]
LAYERS, ROWS, WIDTH, CHUNKS = 4, 1024, 256, 16
BASE = np.random.default_rng(0).integers(0, 2**16, (2 * LAYERS, ROWS, WIDTH)).astype(np.uint16)
NONSENSE = [
    ("POST", "/datasets/{}/slice?chunk=0", b'{"rows":[-1]}'),
    ("POST", "/datasets/{}/slice?chunk=0", b'{"rows":[' + b"9," * 2000 + b"9]"),
    ("POST", "/datasets/{}/slice?chunk=x", b"["),
    ("POST", "/datasets/..%2F..%2Fetc/metadata", b"{}"),
    ("POST", "/datasets/{}/chunks/0", b"--x--"),
    ("PUT", "/files/a/chunk_0.hdf5", b"\x89HDF\r\n\x1a\n" + b"\xff" * 100),
    ("GET", "/files/a/../../../etc/passwd", b""),
]


def chunk(compressed: bool) -> bytes:
    """The file of version 0."""
    buffer = io.BytesIO()
    options = {"chunks": (256, WIDTH), "compression": "gzip", "compression_opts": 1} if compressed else {}
    with h5py.File(buffer, "w") as file:
        for n, values in enumerate(BASE):
            file.create_dataset(f"layer_{n // 2}/{('inputs', 'targets')[n % 2]}", data=values, **options)
    return buffer.getvalue()


class Versions:
    """Files of any version, made from that of version 0 without HDF5."""

    def __init__(self) -> None:
        self._raw, self._packed = bytearray(chunk(False)), chunk(True)
        with h5py.File(io.BytesIO(self._raw)) as file:
            names = [f"layer_{n // 2}/{('inputs', 'targets')[n % 2]}" for n in range(2 * LAYERS)]
            self._offsets = [file[name].id.get_offset() for name in names]

    def file(self, version: int) -> bytes:
        if version == 0:
            return self._packed
        raw = bytearray(self._raw)
        for offset, values in zip(self._offsets, BASE, strict=True):
            raw[offset : offset + values.nbytes] = (values ^ np.uint16(version)).tobytes()
        return bytes(raw)


def one_client(url: str, seed: int, until: float, counts: Counter[str], versions: Versions) -> None:
    """Uploads, slices and nonsense until the time is over."""
    rng, session = random.Random(seed), requests.Session()
    dataset = f"gpt2%2Fmixed_{seed % 4}"
    while time.time() < until:
        n, kind = rng.randrange(CHUNKS), rng.random()
        if kind < 0.2:
            form = {"chunk_file": ("chunk.hdf5", versions.file(rng.choice([0, rng.randrange(1, 2**16)])))}
            answer = session.post(f"{url}/datasets/{dataset}/chunks/{n}", files=form, timeout=120)
            counts["uploads"] += answer.status_code == 201
            counts["wrong"] += answer.status_code != 201
        elif kind < 0.25:
            method, path, body = rng.choice(NONSENSE)
            answer = session.request(method, url + path.format(dataset), data=body, timeout=120)
            counts["refused"] += 400 <= answer.status_code < 500
            counts["wrong"] += not 400 <= answer.status_code < 500
        else:
            start = rng.randrange(ROWS - 64)
            rows = rng.choice([list(range(start, start + 64)), sorted(rng.sample(range(ROWS), 256)), list(range(ROWS))])
            answer = session.post(f"{url}/datasets/{dataset}/slice?chunk={n}", json={"rows": rows}, timeout=120)
            if answer.status_code == 404:  # not uploaded yet
                continue
            right = answer.status_code == 200 and _is_one_version(answer.content, rows)
            counts["slices"] += right
            counts["wrong"] += not right
            counts["bytes"] += len(answer.content)


def _is_one_version(content: bytes, rows: list[int]) -> bool:
    want = BASE[:, rows]
    if len(content) != want.nbytes:
        return False
    found = np.frombuffer(content, np.uint16).reshape(want.shape)
    return np.array_equal(found, want ^ (found[0, 0, 0] ^ want[0, 0, 0]))


def clients(url: str, seeds: range, until: float, results: multiprocessing.Queue) -> None:
    """A process of clients, each a thread."""
    versions, each = Versions(), [Counter[str]() for _ in seeds]
    threads = [
        threading.Thread(target=one_client, args=(url, seed, until, counts, versions))
        for seed, counts in zip(seeds, each, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    idle = sum(not counts["slices"] for counts in each)
    results.put(dict(sum(each, Counter())) | {"idle_clients": idle})


@contextmanager
def server(root: str):
    """The job itself, as a process: its URL and process id."""
    command = [sys.executable, "jobs/serve.py", "--root", root, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process
    finally:
        process.terminate()
        process.wait()


def resident(pid: int, what: str = "VmRSS") -> int:
    """Bytes of memory that a process holds, or (VmHWM) held at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def run(seconds: float, count: int, processes: int) -> dict[str, float]:
    """`count` clients for so long. Returns how many of what, what was wrong, and the server's memory in bytes."""
    with tempfile.TemporaryDirectory() as place, server(f"{place}/root") as (url, process):
        before = resident(process.pid)
        results, until = multiprocessing.Queue(), time.time() + seconds
        shares = [range(i * count // processes, (i + 1) * count // processes) for i in range(processes)]
        workers = [multiprocessing.Process(target=clients, args=(url, share, until, results)) for share in shares]
        for worker in workers:
            worker.start()
        found = sum((Counter(results.get()) for _ in workers), Counter())
        for worker in workers:
            worker.join()
        alive = process.poll() is None and requests.get(f"{url}/api/v1/health", timeout=10).status_code == 200
        memory = {"memory_before": before, "memory_peak": resident(process.pid, "VmHWM")}
        names = {path.name.split("_")[0] for path in Path(place).rglob("*") if path.is_file()}
        elsewhere = len(list(Path(place).iterdir())) - 1 + len(names - {"chunk"})
    keys = ("uploads", "slices", "refused", "wrong", "idle_clients", "bytes")
    rest = {"seconds": seconds, "clients": count, "alive": alive, "files_elsewhere": elsewhere}
    return {key: found[key] for key in keys} | memory | rest


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--minutes", type=float, default=5)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--processes", type=int, default=4, help="of clients")
    p.add_argument("--json", metavar="FILE", help="write the results")
    given = p.parse_args()
    found = run(given.minutes * 60, given.clients, given.processes)
    grown = (found["memory_peak"] - found["memory_before"]) / 1e6
    print(
        f"{found['clients']} clients, {found['seconds']:.0f} s: {found['uploads']:,} uploads, {found['slices']:,} "
        f"slices ({found['bytes'] / 1e9:.2f} GB), {found['refused']:,} refused; wrong: {found['wrong']}"
    )
    print(f"server: {found['memory_before'] / 1e6:.0f} MB before, at most {grown:.0f} MB more; alive: {found['alive']}")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
