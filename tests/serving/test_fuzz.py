"""Requests that nobody meant: never a 500, a file elsewhere, or a server that is gone."""

from __future__ import annotations

import socket

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.serving.conftest import TERMS, chunk, rows_of
from xlc_ray.serving.server import running

ID = "gpt2/pile_train"
MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,), database=None
)
WAIT = 0.1  # seconds: the server waits for the rest of a request that is not whole


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL, root, and all rows of chunk 0; afterwards it still serves them, and nothing lies beside the root."""
    place = tmp_path_factory.mktemp("fuzz")
    raw, whole = chunk()
    (place / "root" / ID).mkdir(parents=True)
    (place / "root" / ID / "chunk_0.hdf5").write_bytes(raw)
    (place / "root" / ID / "index.bin").write_bytes(b"\0" * 16)
    with running(str(place / "root"), None, TERMS, "127.0.0.1", 0) as url:
        yield url, place / "root", whole
        (place / "root" / ID / "chunk_0.hdf5").write_bytes(raw)
        body = requests.post(f"{url}/datasets/{ID}/slice?chunk=0", json={"rows": [3, 1]}).content
        assert body == rows_of(whole, [1, 3])
    assert [path.name for path in place.iterdir()] == ["root"]
    assert not list(place.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_by_and_against_the_schema(server, mode):
    operations = list(schemathesis.openapi.from_url(f"{server[0]}/openapi.json").get_all_operations())
    assert len(operations) > 12
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and "requestBody" not in operation.ok().definition.raw:
            continue  # any word is a path
        cases = operation.ok().as_strategy(generation_mode=mode)
        settings(MANY, max_examples=15)(given(case=cases)(_survives))()


def _survives(case: schemathesis.Case) -> None:
    answer = case.call()
    assert answer.status_code < 500, (case.method, case.path, answer.text)
    if answer.status_code >= 400 and case.method != "HEAD":
        assert "\n" not in str(answer.json()["detail"])


PIECES = [
    "..",
    ".",
    "",
    "a",
    ID,
    "%2F",
    "%00",
    "%ff",
    "..%2F",
    "\\",
    "info",
    "slice",
    "chunks",
    "-1",
    "1e9",
    "manifest.json",
]
PIECES += ["chunk_0.hdf5", "text", "é", "%", "files", "?chunk=0", "?chunk=-1", "?chunk=0&sites=mlp_in.2", "&sites=,"]


@MANY
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]),
    st.sampled_from(["datasets", "files", "list", "size", "checksum", "api/v1", ""]),
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.binary(max_size=200)
    | st.sampled_from([b'{"rows":[0]}', b'{"rows":' + b"[" * 9000, b'{"rows":[1e999]}', b"\xff{}"]),
    st.sampled_from(["application/json", "multipart/form-data", "multipart/form-data; boundary=x", "", "\u00e9"]),
)
def test_paths_and_bodies_of_odd_pieces(server, method, first, pieces, body, kind):
    url, *_ = server
    path = "/".join([first, *pieces])
    raw = f"{method} /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {kind}\r\n".encode(
        "latin-1", "replace"
    )
    raw += f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    status = speak(url, raw)
    assert status is None or status < 500 or status == 501, raw


@MANY
@given(st.binary(max_size=300), st.booleans())
def test_bytes_that_are_no_request(server, raw, begun):
    status = speak(server[0], (b"POST /datasets/a/chunks/0 HTTP/1.1\r\n" if begun else b"") + raw, WAIT)
    assert status is None or status < 500


FORM = b'--x\r\nContent-Disposition: form-data; name="chunk_file"; filename="c"\r\n\r\n%s\r\n--x--\r\n'


@MANY
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8), st.integers(0, 4000))
def test_forms_and_chunks_that_are_damaged(server, at, by, cut):
    good = FORM % chunk()[0]
    spoiled = (good[:at] + by + good[at + len(by) :])[: len(good) if cut > len(good) else cut]
    head = (
        f"POST /datasets/fuzzed/chunks/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(spoiled)}\r\n"
    )
    status = speak(server[0], head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + spoiled)
    assert status in (201, 422)
    if status == 201:  # what was taken can be read
        answer = requests.post(f"{server[0]}/datasets/fuzzed/slice?chunk=1", json={"rows": [0, 39]})
        assert answer.status_code in (200, 422)


def speak(url: str, raw: bytes, wait: float = 20.0) -> int | None:
    """The status of the answer to these bytes; None where there is none."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as door:
        try:
            door.sendall(raw)
            answer = door.recv(100)
        except (ConnectionError, TimeoutError):
            return None
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None
