"""A store on a server is the same store: rows, batches, statistics, text, and writing it there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.activations import test_foreign as foreign
from tests.activations.build import SITES, make, row_tokens, write
from xlc_ray import files
from xlc_ray.activations import http, source, store
from xlc_ray.activations.order import Order
from xlc_ray.config import UserError
from xlc_ray.config.sources import HttpSource
from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running
from xlc_ray.web import ServedFileSystem

CHUNKS = [50, 50, 50, 17]
TERMS = Terms(1 << 26, 1 << 24, 1 << 18)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("root")
    with running(str(root), None, TERMS, "127.0.0.1", 0) as url:
        yield url, root


@pytest.fixture(scope="module")
def both(served) -> tuple[store.Store, store.Store]:
    """The same store, opened as a directory and on the server."""
    url, root = served
    here = make(root / "tiny/novels_train", CHUNKS)
    return here, store.open_source(HttpSource(url=url, dataset_id="tiny/novels_train"))


def test_it_knows_of_itself_what_the_directory_does(both):
    here, there = both
    assert there.manifest == here.manifest
    for site, found in there.statistics().items():
        assert np.array_equal(found.mean, here.statistics()[site].mean)
        assert found.mean_norm == here.statistics()[site].mean_norm
    assert np.array_equal(row_tokens(there.windows(3)), row_tokens(here.windows(3)))
    there.verify()


@pytest.mark.parametrize("replicas", [1, 3])
def test_batches_are_those_of_the_directory_bit_for_bit(both, replicas):
    order = Order(CHUNKS, 1, 8, 5)
    for replica in range(replicas):
        share = source.Share(30, 2, 14, replica, replicas)
        streams = [source.batches(d, order, list(SITES), share) for d in both]
        for here, there in zip(*streams, strict=True):
            assert list(here) == list(there)
            assert all(torch.equal(here[site], there[site]) for site in SITES)


def test_repeated_rows_in_any_order(both):
    chunk, row = np.array([3, 0, 0, 2, 0]), np.array([16, 49, 0, 7, 49])
    here, there = (data.gather(chunk, row, ["resid_post.0", "mlp_in.0"]) for data in both)
    assert all(np.array_equal(here[site], there[site]) for site in here)


def test_a_store_is_written_there_and_goes_on_where_it_was(served):
    url, root = served
    path = HttpSource(url=url, dataset_id="written/here").path
    with pytest.raises(UserError, match=r"written/here: no activations here"):
        store.open_store(path)
    made = make(path, CHUNKS)
    made.verify()
    local = store.open_store(str(root / "written/here"))
    local.verify()
    assert local.manifest == made.manifest
    files.remove(files.join(path, "chunk_2.hdf5"))
    assert store.missing_chunks(path, len(CHUNKS)) == [2]
    with pytest.raises(UserError, match=r"chunk_2\.hdf5: the chunk is missing"):
        made.verify()
    with pytest.raises(UserError, match="chunk 2 is missing"):
        made.read(2, 0, 3, ["mlp_in.0"])
    write(path, 2, CHUNKS[2], 100)
    made.verify()
    assert not [name for name in files.listdir(path) if "part" in name]


def test_a_directory_of_it_is_removed_there_file_by_file(served):
    url, root = served
    there = f"xlc+{url}/removed"
    make(root / "removed", [9])
    make(root / "kept", [9])
    kept = sorted(path for path in (root / "kept").rglob("*") if path.is_file())
    files.remove(f"{there}/text")
    assert not list((root / "removed/text").iterdir())
    assert (root / "removed/manifest.json").exists()
    files.remove(there)
    assert not [path for path in (root / "removed").rglob("*") if path.is_file()]
    assert sorted(path for path in (root / "kept").rglob("*") if path.is_file()) == kept
    files.remove(there)  # where nothing is


def test_a_server_takes_no_chunks_whose_rows_it_could_not_give(served):
    url, root = served
    with pytest.raises(UserError, match="cannot give rows of bfloat16_zstd; allowed there: bfloat16"):
        store.begin(f"xlc+{url}/zstd", {"dtype": "bfloat16_zstd"})
    assert not (root / "zstd").exists()


def test_answers_are_bounded_in_bytes(served, monkeypatch):
    url, root = served
    here = make(root / "wide", [300, 40])
    monkeypatch.setattr(http, "_ANSWER", 4096)
    asked = []

    def slice_of(fs, dataset, chunk, rows, sites):
        asked.append(fetch(fs, dataset, chunk, rows, sites))
        return asked[-1]

    fetch = ServedFileSystem.slice
    monkeypatch.setattr(ServedFileSystem, "slice", slice_of)
    there = store.open_source(HttpSource(url=url, dataset_id="wide"))
    found = there.read(0, 0, 300, list(SITES))
    assert all(np.array_equal(found[site], values) for site, values in here.read(0, 0, 300, list(SITES)).items())
    assert max(map(len, asked)) <= 4096 < sum(map(len, asked))


@pytest.mark.parametrize("url", ["host:8000", "http://", "http://h:1/prefix", "https://user@h", "http://h:1/?x=1"])
def test_a_url_is_a_server_alone(url):
    with pytest.raises(ValueError, match=r"should be http://host:port"):
        HttpSource(url=url, dataset_id="x")
    assert HttpSource(url="http://h:1/", dataset_id="x").url == "http://h:1"


def test_altered_chunk_is_found_by_the_servers_checksum(served):
    url, root = served
    make(root / "altered", CHUNKS)
    data = store.open_source(HttpSource(url=url, dataset_id="altered"))
    path = root / "altered/chunk_1.hdf5"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: altered"):
        data.verify()


@pytest.mark.parametrize(("dtype", "compression"), [("bfloat16", None), ("float16", "gzip"), ("float32", "gzip")])
def test_datasets_of_crosslayer_coding_are_read_by_its_routes(served, dtype, compression):
    url, root = served
    name = f"gpt2/pile_{dtype}"
    (root / name).mkdir(parents=True)
    values = foreign.write(root / name, dtype, compression)
    foreign.edit(root / name / "metadata.json", lambda m: m.update(dtype=dtype))
    there, here = store.open_source(HttpSource(url=url, dataset_id=name)), store.open_store(str(root / name))
    assert there.manifest.sites == here.manifest.sites
    assert there.chunk_rows == here.chunk_rows
    there.verify()
    found = there.gather(np.array([2, 0, 1]), np.array([8, 39, 17]), foreign.SITES[1:3])
    assert np.array_equal(found["mlp_in.10"], values[[88, 39, 57], :, 1, 0])
    assert np.array_equal(found["mlp_out.2"], values[[88, 39, 57], :, 0, 1])
    assert there.statistics()["mlp_out.10"].std.tolist() == [2.0] * foreign.WIDTH
    assert there.windows(0) is None


def test_verify_of_a_dataset_of_crosslayer_coding_reads_every_row_once(served, monkeypatch):
    url, root = served
    path, asked, fetch = root / "whole", [], ServedFileSystem.slice
    path.mkdir()
    foreign.write(path)
    foreign.edit(path / "metadata.json", lambda m: m.update(dtype="bfloat16"))

    def slice_of(fs, dataset, chunk, rows, sites):
        asked.extend((chunk, row) for row in rows)
        return fetch(fs, dataset, chunk, rows, sites)

    monkeypatch.setattr(ServedFileSystem, "slice", slice_of)
    monkeypatch.setattr(store, "VERIFIED_AT_ONCE", 16)
    there = store.open_source(HttpSource(url=url, dataset_id="whole"))
    there.verify()
    assert sorted(asked) == [(chunk, row) for chunk, rows in enumerate(foreign.ROWS) for row in range(rows)]
    (path / "chunk_2.hdf5").unlink()
    with pytest.raises(UserError, match="chunk 2 is missing"):
        there.verify()


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("norm_stats.json", None, "norm_stats: missing"),
        ("norm_stats.json", lambda s: s.pop("10"), "num_layers is 2, norm_stats has 1"),
        ("metadata.json", lambda m: m.update(dtype="int8"), "dtype is int8; allowed: float32, float16, bfloat16"),
        ("metadata.json", lambda m: m.update(total_tokens=90), "does not describe the 90"),
    ],
)
def test_datasets_that_disagree_name_what(served, file, change, match):
    url, root = served
    path = root / "broken"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    foreign.write(path)
    foreign.edit(path / "metadata.json", lambda m: m.update(dtype="bfloat16"))
    foreign.edit(path / file, change) if change else (path / file).unlink()
    with pytest.raises(UserError, match=match):
        store.open_source(HttpSource(url=url, dataset_id="broken"))


def test_the_token_comes_from_the_environment(tmp_path, monkeypatch):
    with running(str(tmp_path), "secret", TERMS, "127.0.0.1", 0) as url:
        path = HttpSource(url=url, dataset_id="a/b", token_env="TEST_TOKEN").path
        assert "secret" not in path
        monkeypatch.delenv("TEST_TOKEN", raising=False)
        with pytest.raises(UserError, match="token_env: the environment variable TEST_TOKEN is not set"):
            store.open_store(path)
        monkeypatch.setenv("TEST_TOKEN", "wrong")
        with pytest.raises(UserError, match=r"refused \(401\)"):
            store.open_store(path)
        monkeypatch.setenv("TEST_TOKEN", "secret")
        make(path, [20]).verify()
        with pytest.raises(UserError, match="token_env is not set"):
            store.open_source(HttpSource(url=url, dataset_id="a/b"))
