"""The routes as crosslayer-coding's client uses them, and what our server refuses that the public one does not."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from dataclasses import replace
from urllib.parse import quote

import h5py
import numpy as np
import pytest
import requests

from tests.serving.conftest import TERMS, chunk, rows_of
from xlc_ray.config import UserError
from xlc_ray.serving.server import make_server, running

ID = "gpt2/pile_train"


def test_a_dataset_as_its_generator_uploads_it_and_training_reads_it(client):
    assert client.session.get(f"{client.url}/api/v1/health").json() == {"status": "ok"}
    wholes = []
    for index, (rows, options) in enumerate([(40, {}), (40, {"chunks": (16, 5)}), (40, {"compression": "gzip"})]):
        raw, whole = chunk(rows, seed=index, **options)
        answer = client.upload(ID, index, raw)
        assert (answer.status_code, answer.json()) == (201, {"status": "ok"})
        wholes.append(whole)
    index = np.array([(i, 40, 0, 0) for i in range(3)], "<i4").tobytes()
    form = {"manifest_file": ("index.bin", io.BytesIO(index), "application/octet-stream")}
    assert client.session.post(client.at(ID, "manifest"), files=form).status_code == 201
    metadata, stats = {"num_layers": 2, "d_model": 5, "total_tokens": 120}, {"2": {}, "10": {}}
    assert client.session.post(client.at(ID, "metadata"), json=metadata).status_code == 201
    assert client.session.post(client.at(ID, "norm_stats"), json=stats).status_code == 201

    assert client.session.get(client.at(ID, "info")).json() == metadata
    assert client.session.get(client.at(ID, "norm_stats")).json() == stats
    assert client.session.get(client.at(ID, "manifest")).content == index
    for i, whole in enumerate(wholes):
        for rows in ([0], [39, 3, 17, 3], list(range(40)), [15, 16, 17, 31, 32]):
            assert client.slice(ID, i, rows).content == rows_of(whole, rows)
    assert sorted(os.listdir(client.root / ID)) == sorted(
        ["chunk_0.hdf5", "chunk_1.hdf5", "chunk_2.hdf5", "index.bin", "metadata.json", "norm_stats.json"]
    )
    # An id that is not percent-encoded means the same.
    assert client.session.get(f"{client.url}/datasets/{ID}/info").json() == metadata


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_types_are_sent_as_they_are(client, dtype):
    raw, whole = chunk(dtype=dtype)
    client.upload(ID, 0, raw)
    assert client.slice(ID, 0, [7, 2]).content == rows_of(whole, [2, 7], dtype=dtype)


def test_older_datasets_with_h5_are_served_until_a_chunk_is_replaced(client):
    (old, whole), (new, other) = chunk(seed=1), chunk(seed=2)
    (client.root / ID).mkdir(parents=True)
    (client.root / ID / "chunk_0.h5").write_bytes(old)
    assert client.slice(ID, 0, [5]).content == rows_of(whole, [5])
    client.upload(ID, 0, new)
    assert os.listdir(client.root / ID) == ["chunk_0.hdf5"]
    assert client.slice(ID, 0, [5]).content == rows_of(other, [5])


def test_a_replaced_chunk_is_never_served_stale(client):
    for seed in range(20):
        # Of the same size as the one before, and every third laid out otherwise.
        raw, whole = chunk(seed=seed, **({"compression": "gzip"} if seed % 3 == 2 else {}))
        assert client.upload(ID, 0, raw).status_code == 201
        assert client.slice(ID, 0, [39, 0]).content == rows_of(whole, [0, 39])


def test_a_slice_that_began_ends_with_the_chunk_it_began_with(client):
    rows, width = 1000, 40  # more than a socket holds, so that the server is amid it
    (old, whole), (new, _) = (chunk(rows, width, seed) for seed in (1, 2))
    client.upload(ID, 0, old)
    body = json.dumps({"rows": list(range(rows))}).encode()
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            f"POST /datasets/{ID}/slice?chunk=0 HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        start = slow.recv(1000)
        assert client.upload(ID, 0, new).status_code == 201
        received = start
        while more := slow.recv(1 << 16):
            received += more
    assert received.partition(b"\r\n\r\n")[2] == whole


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"rows": []}, 400, "none are asked for"),
        ({"rows": [0, 40]}, 422, "0 to 40; the chunk has 0 to 39"),
        ({"rows": [-1]}, 422, "the chunk has 0 to 39"),
        ({"rows": [10**40]}, 422, "the chunk has 0 to 39"),
        ({"rows": [1.0]}, 422, "whole numbers"),
        ({"rows": [True]}, 422, "whole numbers"),
        ({"rows": "0"}, 422, "whole numbers"),
        ({"rows": [0] * 1001}, 422, "at most 1000"),
        ({}, 422, "whole numbers"),
        ([0], 422, "whole numbers"),
    ],
)
def test_rows_that_are_not_there_are_refused_in_a_line(client, body, status, says):
    client.upload(ID, 0, chunk()[0])
    answer = client.session.post(client.at(ID, "slice?chunk=0"), json=body)
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


def test_what_is_not_there_is_404(client):
    client.upload(ID, 0, chunk()[0])
    for rest in ("info", "norm_stats", "manifest"):
        assert client.session.get(client.at(ID, rest)).status_code == 404
        assert client.session.get(client.at("no/such", rest)).status_code == 404
    assert client.slice(ID, 1, [0]).status_code == 404
    assert client.slice("no/such", 0, [0]).status_code == 404
    assert client.session.get(f"{client.url}/files/{ID}/chunk_1.hdf5").status_code == 404


CLIMBING = ["..", "../outside", "a/../../outside", "a/./b", "/etc", "a//b", ".hidden", "a\\..\\b", "a\x00b", "a\nb"]
IN_THE_WAY = ["a/text", "a/metadata.json", "a/chunk_0.hdf5/b", "x" * 250, "/".join("abcdefghi")]


@pytest.mark.parametrize("dataset", [*CLIMBING, *IN_THE_WAY])
def test_ids_that_climb_out_or_stand_in_the_way_are_refused(client, tmp_path, dataset):
    secret = tmp_path / "outside"
    secret.mkdir()
    (secret / "metadata.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    assert client.session.get(client.at(dataset, "info")).status_code in (404, 422)
    assert client.upload(dataset, 0, chunk()[0]).status_code in (404, 422)
    assert client.session.post(client.at(dataset, "metadata"), json={}).status_code in (404, 422)
    assert client.session.put(f"{client.url}/files/..%2Foutside%2Fmetadata.json", data=b'{"a":1}').status_code == 422
    assert sorted(tmp_path.rglob("*")) == before
    assert (secret / "metadata.json").read_text() == "{}"


def test_links_that_lead_out_are_not_followed(client, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "metadata.json").write_text("{}")
    client.root.mkdir(exist_ok=True)
    (client.root / "link").symlink_to(outside)
    assert client.session.get(client.at("link", "info")).status_code == 404
    assert client.session.post(client.at("link", "norm_stats"), json={}).status_code == 404
    assert os.listdir(outside) == ["metadata.json"]


@pytest.mark.parametrize("how", ["link", "group", "external", "virtual"])
def test_chunks_that_point_into_other_files_are_refused(client, tmp_path, how):
    secret = tmp_path / "secret.hdf5"
    with h5py.File(secret, "w") as file:
        file["layer_2/inputs"] = np.full((4, 5), 7, np.uint16)
        file["packed/values"] = np.full((4, 5), 7, np.int8)
    name = tmp_path / "chunk.hdf5"
    with h5py.File(name, "w") as file:
        file["layer_2/targets"] = np.zeros((4, 5), np.uint16)
        if how == "link":
            file["layer_2/inputs"] = h5py.ExternalLink(str(secret), "layer_2/inputs")
        elif how == "group":
            file["int8/resid_post.0"] = h5py.ExternalLink(str(secret), "packed")
        elif how == "external":
            external = [(str(secret), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("layer_2/inputs", (4, 5), np.uint16, external=external)
        else:
            layout = h5py.VirtualLayout((4, 5), np.uint16)
            layout[:] = h5py.VirtualSource(str(secret), "layer_2/inputs", (4, 5))
            file.create_virtual_dataset("layer_2/inputs", layout)
    answer = client.upload(ID, 0, name.read_bytes())
    assert answer.status_code == 422
    assert ("int8/resid_post.0" if how == "group" else "layer_2/inputs") in answer.json()["detail"]
    (client.root / ID).mkdir(parents=True, exist_ok=True)
    (client.root / ID / "chunk_0.hdf5").write_bytes(name.read_bytes())  # nor if it came in another way
    assert client.slice(ID, 0, [0]).status_code == 422


def test_damaged_uploads_leave_nothing(client):
    good = chunk()[0]
    bad = [b"", b"x" * 100, good[:8], good[: len(good) // 2], good[:8] + b"\xff" * 500]
    for raw in bad:
        assert client.upload(ID, 0, raw).status_code == 422
    assert os.listdir(client.root / ID) == []
    client.upload(ID, 0, good)
    assert client.upload(ID, 0, bad[3]).status_code == 422
    assert (client.root / ID / "chunk_0.hdf5").read_bytes() == good


def test_sizes_are_bounded(client):
    big = chunk(rows=60_000)[0]
    assert len(big) > TERMS.chunk_bytes
    answer = client.upload(ID, 0, big)
    assert (answer.status_code, "are taken" in answer.json()["detail"]) == (413, True)
    stream = client.session.put(f"{client.url}/files/{ID}/chunk_0.hdf5", data=iter([big[:700_000], big[700_000:]]))
    assert stream.status_code == 413  # without a length in front, too
    assert client.session.post(client.at(ID, "metadata"), json={"x": "y" * 70_000}).status_code == 413
    assert not [path for path in client.root.rglob("*") if path.is_file()]


def test_a_client_that_breaks_off_leaves_nothing(client):
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as gone:
        head = f"PUT /files/{ID}/chunk_0.hdf5 HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        gone.sendall(head.encode() + b"x" * 50_000)
    for _ in range(100):
        found = [path for path in client.root.rglob("*") if path.is_file()]
        if not found and (client.root / ID).is_dir():
            break
        threading.Event().wait(0.05)
    assert found == []
    assert client.upload(ID, 0, chunk()[0]).status_code == 201


def test_a_complete_store_of_ours_is_not_changed_by_their_route(client):
    client.upload(ID, 0, chunk()[0])
    client.session.put(f"{client.url}/files/{ID}/manifest.json", data=b"{}")
    assert client.upload(ID, 0, chunk(seed=5)[0]).status_code == 409
    route, index = f"{client.url}/datasets/{quote(ID, safe='')}", {"manifest_file": b"\0" * 16}
    assert client.session.post(f"{route}/manifest", files=index).status_code == 409
    for name in ("metadata", "norm_stats"):
        assert client.session.post(f"{route}/{name}", json={"x": 1}).status_code == 409
    assert {path.name for path in (client.root / ID).iterdir()} == {"chunk_0.hdf5", "manifest.json"}


def test_ranges_of_files(client):
    raw = chunk()[0]
    client.upload(ID, 0, raw)
    url = f"{client.url}/files/{ID}/chunk_0.hdf5"
    for header, status, part in [
        ("bytes=8-15", 206, raw[8:16]),
        ("bytes=100-", 206, raw[100:]),
        ("bytes=-10", 206, raw[-10:]),
        (f"bytes=0-{10**15}", 206, raw),
        (f"bytes={len(raw)}-", 416, None),
        ("bytes=9-8", 416, None),
        ("lines=1-2", 200, raw),
        ("bytes=-", 200, raw),
    ]:
        answer = client.session.get(url, headers={"Range": header})
        assert answer.status_code == status
        assert part is None or answer.content == part
    head = client.session.head(url)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(raw)))


def test_without_the_token_nothing_is_said_or_done(tmp_path):
    with running(str(tmp_path), "secret", TERMS, "127.0.0.1", 0) as url:
        (tmp_path / "a").mkdir()
        (tmp_path / "a/metadata.json").write_text("{}")
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            assert requests.get(f"{url}/datasets/a/info", headers=headers).status_code == 401
            assert requests.post(f"{url}/datasets/b/metadata", json={}, headers=headers).status_code == 401
        assert os.listdir(tmp_path) == ["a"]
        assert requests.get(f"{url}/datasets/a/info", headers={"Authorization": "Bearer secret"}).json() == {}
        assert requests.get(f"{url}/api/v1/health").status_code == 200


def test_the_index_can_have_the_one_form_that_the_training_client_reads(tmp_path):
    (tmp_path / "a").mkdir()
    np.array([(1, 3, 0, 0), (0, 2, 3, 0)], "<i4").tofile(tmp_path / "a/index.bin")
    (tmp_path / "a/metadata.json").write_text('{"total_tokens": 5}')
    with running(str(tmp_path), None, replace(TERMS, row_index=True), "127.0.0.1", 0) as url:

        def ask() -> list[list[int]]:
            return np.frombuffer(requests.get(f"{url}/datasets/a/manifest").content, "<u4").reshape(-1, 2).tolist()

        assert ask() == [[1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]
        rows = [[0, 1], [1, 0], [0, 0], [1, 1]]
        np.array(rows, "<u4").tofile(tmp_path / "a/index.bin")
        assert ask() == rows
        (tmp_path / "a/index.bin").unlink()
        assert requests.get(f"{url}/datasets/a/manifest").status_code == 404


def test_a_server_serves_a_folder_of_its_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--root s3://bucket/x: allowed: a local folder"):
        make_server("s3://bucket/x", None, TERMS)
    assert list(tmp_path.iterdir()) == []
