"""A server in a thread, of a folder of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import h5py
import numpy as np
import pytest
import requests

from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running

TERMS = Terms(chunk_bytes=1 << 20, json_bytes=1 << 16, rows=1000)
LAYERS = (2, 10)  # sorted by number, not by name


class Client:
    """What crosslayer-coding's generator and training send, in its words, and what comes back."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root, self.session = url, root, requests.Session()

    def at(self, dataset: str, rest: str) -> str:
        return f"{self.url}/datasets/{quote(dataset, safe='')}/{rest}"

    def upload(self, dataset: str, index: int, raw: bytes, name: str = "chunk_0.hdf5") -> requests.Response:
        form = {"chunk_file": (name, io.BytesIO(raw), "application/x-hdf5")}
        headers = {"X-Num-Tokens": "16384", "X-Saved-Dtype": "bfloat16"}  # it sends the threshold, not the count
        return self.session.post(self.at(dataset, f"chunks/{index}"), files=form, headers=headers)

    def slice(self, dataset: str, chunk: int, rows: list[int]) -> requests.Response:
        return self.session.post(self.at(dataset, f"slice?chunk={chunk}"), json={"rows": rows})


@pytest.fixture
def client(tmp_path) -> Iterator[Client]:
    root = tmp_path / "served"
    with running(str(root), None, TERMS, "127.0.0.1", 0) as url:
        yield Client(url, root)


def chunk(rows: int = 40, width: int = 5, seed: int = 0, dtype: str = "uint16", **options) -> tuple[bytes, bytes]:
    """A chunk file of crosslayer-coding's, and all its rows as a slice gives them."""
    buffer, rng, whole = io.BytesIO(), np.random.default_rng(seed), []
    with h5py.File(buffer, "w", libver="latest") as file:
        for layer in LAYERS:
            for end in ("inputs", "targets"):
                values = rng.integers(0, 2**16, (rows, width)).astype(dtype)
                file.create_dataset(f"layer_{layer}/{end}", data=values, **options)
                whole.append(values)
    return buffer.getvalue(), b"".join(values.tobytes() for values in whole)


def rows_of(whole: bytes, rows: list[int], of: int = 40, width: int = 5, dtype: str = "uint16") -> bytes:
    """The slice of some rows, from all of them."""
    arrays = np.frombuffer(whole, dtype).reshape(2 * len(LAYERS), of, width)
    return arrays[:, sorted(rows)].tobytes()
