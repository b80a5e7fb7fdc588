"""Stores at URLs: on a static web server that fails on demand, and on S3, read through a disk cache or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.activations.build import SITES, make, row_tokens
from tests.activations.static import serve
from xlc_ray import files, web
from xlc_ray.activations import ranges, source, store
from xlc_ray.activations.cache import BLOCK, DiskCache
from xlc_ray.activations.manifest import ChunkRecord
from xlc_ray.activations.order import Order
from xlc_ray.activations.ranges import Span
from xlc_ray.config import UserError
from xlc_ray.config.sources import Cache, HttpSource, StoreSource

CHUNKS = [50, 50, 50, 17]
WIDE = {"mlp_in.0": 600, "mlp_out.0": 600, "resid_post.0": 4}  # chunks of several blocks of a cache


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make(tmp_path_factory.mktemp("store"), [400, 400, 30], sites=WIDE)


@pytest.fixture
def server(local):
    with serve(local.path) as running:
        yield running


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(web, "FIRST_DELAY", 0.01)


def batches(data, sites=tuple(WIDE)):
    order = Order(data.chunk_rows, 1, 8, 20)
    return list(source.batches(data, order, list(sites), source.Share(100, 1, 9)))


def equal(here, there):
    return all(torch.equal(a[site], b[site]) for a, b in zip(here, there, strict=True) for site in a)


def test_batches_over_a_static_server_are_those_of_the_directory(local, server):
    data = store.open_store(server.url)
    data.verify()
    del server.asked[:]
    assert equal(batches(local), batches(data))
    assert all(span is not None for _, _, span in server.asked)  # never a chunk whole


@pytest.mark.parametrize("fault", [503, 429, "cut", "drop"])
def test_what_passes_is_tried_again(local, server, fault):
    data = store.open_store(server.url)
    server.fault = lambda n, path: fault if n % 3 == 0 else None
    assert equal(batches(local), batches(data))


@pytest.mark.parametrize(
    ("fault", "match"),
    [(503, "no answer after 6 attempts.*503"), ("drop", "no answer after 6 attempts"), (403, "cannot be used.*403")],
)
def test_what_does_not_pass_ends_in_a_line(local, server, fault, match):
    data = store.open_store(server.url)
    server.fault = lambda n, path: fault if path == "/chunk_1.hdf5" else None
    del server.asked[:]
    with pytest.raises(UserError, match=match):
        data.read(1, 0, 1, ["mlp_in.0"])
    tried = 1 if fault == 403 else web.ATTEMPTS
    assert len(server.asked) in (tried, 2 * tried if fault == "drop" else tried)  # aiohttp itself tries once more
    server.fault = lambda n, path: fault
    with pytest.raises(UserError, match=match):  # and is not taken for a store that is not there
        store.open_store(server.url)


def test_servers_that_are_gone_or_know_no_ranges_are_named(local, server):
    data = store.open_store(server.url)
    server.ranges = False
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: cut, or its server knows no byte ranges"):
        data.read(1, 0, 1, ["mlp_in.0"])
    with pytest.raises(UserError, match="no answer after 6 attempts"):
        store.open_store("http://127.0.0.1:9/store")
    with pytest.raises(UserError, match="no answer after 6 attempts"):
        store.open_source(HttpSource(url="http://127.0.0.1:9", dataset_id="store"))


@pytest.mark.parametrize(("fault", "tries"), [(503, 6), ("drop", 6), ("cut", 6), (400, 1)])
def test_slices_of_a_server_that_fails_are_tried_again_and_end_in_a_line(server, fault, tries):
    fs, _ = files.filesystem(HttpSource(url=server.url, dataset_id="a").path)
    server.fault = lambda n, path: fault
    place = Path(server.root, "datasets/a")
    place.mkdir(parents=True, exist_ok=True)
    (place / "slice").write_bytes(b"x" * 100)
    with pytest.raises(
        UserError, match="no answer after 6 attempts" if fault in ("drop", "cut") else f"refused .{fault}"
    ):
        fs.slice("a", 0, [0], None)
    assert len(server.asked) == tries
    server.fault = lambda n, path: fault if n == tries else None
    if tries > 1:
        assert fs.slice("a", 0, [0], None) == b"x" * 100


def test_a_cache_serves_what_was_read_and_nothing_older(tmp_path, local, server):
    settings = StoreSource(path=server.url, cache=Cache(path=str(tmp_path / "cache")))
    first = store.open_source(settings)
    assert equal(batches(local), batches(first))
    del server.asked[:]
    again = store.open_source(settings)
    del server.asked[:]
    assert equal(batches(local), batches(again))
    assert server.asked == []
    records = [r.model_copy(update={"checksum": "made anew"}) for r in again.manifest.chunks]
    remade = store.Store(again.path, again.manifest.model_copy(update={"chunks": tuple(records)}), again.cache)
    remade.read(0, 0, 1, ["mlp_in.0"])
    assert len(server.asked) == 1


def test_small_pieces_hold_no_more_than_the_bound_beside_a_cache(tmp_path, monkeypatch):
    """A block is fetched for each piece, however small, and counts whole."""
    record = ChunkRecord(index=0, file="x", rows=1, bytes=100 * BLOCK, checksum="x", offsets={})
    spans = [Span(record, n * BLOCK + 10, n * BLOCK + 30) for n in range(100)]
    batches = []

    def fetch(path, asked):
        batches.append(sum(span.stop - span.start for span in asked))
        return [bytes([span.start // BLOCK]) * (span.stop - span.start) for span in asked]

    monkeypatch.setattr(ranges, "fetch", fetch)
    monkeypatch.setattr(ranges, "_TOGETHER", 8 * BLOCK)
    found = list(ranges.read("s3://x", spans, DiskCache(str(tmp_path), 1 << 30)))
    assert found == [bytes([n]) * 20 for n in range(100)]
    assert max(batches) == 8 * BLOCK


def test_cut_and_foreign_files_in_a_cache_count_as_missing(tmp_path, local, server):
    settings = StoreSource(path=server.url, cache=Cache(path=str(tmp_path)))
    batches(store.open_source(settings))
    for n, block in enumerate(sorted(tmp_path.glob("??/*"))):
        block.write_bytes(b"" if n % 2 else block.read_bytes()[:-1])
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab/left.1.part").write_bytes(b"x")
    assert equal(batches(local), batches(store.open_source(settings)))


def test_a_small_cache_stays_within_its_bound_and_changes_nothing(tmp_path, local, server):
    data = store.Store(server.url, local.manifest, DiskCache(str(tmp_path), 2 * BLOCK + 5000))
    assert equal(batches(local), batches(data))
    held = [block.stat().st_size for block in tmp_path.glob("??/*")]
    assert 0 < sum(held) <= 2 * BLOCK + 5000


@pytest.fixture(scope="module")
def s3():
    """A bucket of a local S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fs, _ = files.filesystem("s3://bucket")
        fs.mkdir("bucket")
        yield "s3://bucket"
        server.stop()


def test_a_store_on_s3_is_written_read_resumed_and_verified(s3, tmp_path):
    here, there = make(tmp_path / "here", CHUNKS), make(f"{s3}/deep/store", CHUNKS)
    assert there.manifest == here.manifest
    there.verify()
    assert equal(batches(here, SITES), batches(there, SITES))
    cached = StoreSource(path=f"{s3}/deep/store", cache=Cache(path=str(tmp_path / "cache")))
    assert equal(batches(here, SITES), batches(store.open_source(cached), SITES))
    assert np.array_equal(row_tokens(there.windows(2)), row_tokens(here.windows(2)))
    files.remove(f"{s3}/deep/store/chunk_1.hdf5")
    assert store.missing_chunks(f"{s3}/deep/store", len(CHUNKS)) == [1]
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: the chunk is missing"):
        there.read(1, 0, 1, ["mlp_in.0"])


def test_buckets_that_are_not_there_or_closed_are_one_line(s3):
    with pytest.raises(UserError, match="no activations here"):
        store.open_store("s3://bucket/nothing")
    with pytest.raises(UserError, match=r"s3://no-such-bucket"):
        make("s3://no-such-bucket/store", CHUNKS)
