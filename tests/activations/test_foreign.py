"""Datasets as crosslayer-coding leaves them, written here by hand."""

import json

import h5py
import numpy as np
import pytest
import torch

from xlc_ray.activations import foreign, reading, store
from xlc_ray.config import UserError

ROWS = [40, 40, 9]
WIDTH = 5
LAYERS = [2, 10]  # sorted by number, not by name
SITES = ["mlp_in.2", "mlp_out.2", "mlp_in.10", "mlp_out.10"]


def content(dtype):
    values = torch.randn(sum(ROWS), WIDTH, len(LAYERS), 2, generator=torch.Generator().manual_seed(0))
    if dtype == "bfloat16":
        return values.bfloat16().view(torch.uint16).numpy()
    return values.numpy().astype(dtype)


def write(path, dtype="bfloat16", compression=None, ending="hdf5", legacy=False):
    values, first = content(dtype), np.cumsum([0, *ROWS])
    for i, rows in enumerate(ROWS):
        with h5py.File(path / f"chunk_{i}.{ending}", "w") as file:
            for k, layer in enumerate(LAYERS):
                for e, end in enumerate(("inputs", "targets")):
                    data = values[first[i] : first[i + 1], :, k, e]
                    chunks = (min(rows, 16), WIDTH) if compression else None
                    file.create_dataset(f"layer_{layer}/{end}", data=data, chunks=chunks, compression=compression)
    if legacy:
        pairs = [(i, r) for i, rows in enumerate(ROWS) for r in range(rows)]
        np.random.default_rng(0).permutation(np.array(pairs, "<u4")).tofile(path / "index.bin")
    else:
        with open(path / "index.bin", "wb") as file:
            for i in reversed(range(len(ROWS))):
                np.array([i, ROWS[i]], "<i4").tofile(file)
                np.array([first[i]], "<i8").tofile(file)
    vector = {"mean": [0.5] * WIDTH, "std": [2.0] * WIDTH}
    stats = {str(layer): {"inputs": vector, "targets": vector} for layer in LAYERS}
    (path / "norm_stats.json").write_text(json.dumps(stats))
    metadata = {"model_name": "gpt2", "num_layers": 2, "d_model": WIDTH, "total_tokens": sum(ROWS)}
    (path / "metadata.json").write_text(json.dumps(metadata))
    return values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize(("ending", "legacy"), [("hdf5", False), ("h5", True)])
def test_every_variant_is_read(tmp_path, dtype, compression, ending, legacy):
    values = write(tmp_path, dtype, compression, ending, legacy)
    data = store.open_store(str(tmp_path))
    assert data.dtype == dtype
    assert data.chunk_rows == ROWS
    assert list(data.manifest.sites) == SITES
    assert data.manifest.model == "gpt2"
    data.verify()
    chunk, row = np.array([2, 0, 0, 1, 2]), np.array([8, 39, 0, 17, 0])
    found = data.gather(chunk, row, SITES)
    for k in range(2):
        for e in range(2):
            assert np.array_equal(found[SITES[2 * k + e]], values[chunk * 40 + row, :, k, e])
    statistics = data.statistics()["mlp_out.10"]
    assert (statistics.count, statistics.mean.tolist(), statistics.mean_norm) == (89, [0.5] * WIDTH, None)
    assert data.windows(0) is None


def test_what_lies_in_one_piece_is_read_by_offsets_but_not_through_a_link(tmp_path, monkeypatch):
    values = write(tmp_path)
    with h5py.File(tmp_path / "chunk_0.hdf5", "r") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("first", data=np.zeros((40, WIDTH), np.uint16))
        file.copy("layer_10/targets", other, "targets")
    with h5py.File(tmp_path / "chunk_0.hdf5", "a") as file:
        del file["layer_10/targets"]
        file["layer_10/targets"] = h5py.ExternalLink("other.h5", "targets")
    by_h5py, read = [], reading._scatter_hdf5

    def watched(dataset, *args):
        by_h5py.append(dataset.name)
        read(dataset, *args)

    monkeypatch.setattr(reading, "_scatter_hdf5", watched)
    found = store.open_store(str(tmp_path)).read(0, 0, 40, SITES)
    for number, site in enumerate(SITES):
        assert np.array_equal(found[site], values[:40, :, number // 2, number % 2])
    assert by_h5py == ["/targets"]


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("10"), r"10\.inputs\.mean"),
        (lambda s: s["2"].pop("targets"), r"2\.targets\.mean"),
        (lambda s: s["2"]["inputs"]["std"].pop(), r"2\.inputs\.std: missing or not 5 numbers"),
        (lambda s: s["2"]["inputs"].update(mean=["a"] * WIDTH), "not 5 numbers"),
        (lambda s: s["2"]["inputs"].update(std=[float("nan")] * WIDTH), "finite"),
        (lambda s: s["2"]["inputs"].update(std=[-1.0] * WIDTH), "negative"),
    ],
)
def test_statistics_that_do_not_fit_name_the_file(tmp_path, change, match):
    write(tmp_path)
    edit(tmp_path / "norm_stats.json", change)
    with pytest.raises(UserError, match=rf"norm_stats\.json: .*{match}"):
        store.open_store(str(tmp_path))


@pytest.mark.parametrize("name", ["norm_stats.json", "metadata.json", "chunk_1.hdf5"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: .*missing"):
        store.open_store(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("total_tokens", 90, r"index\.bin: does not describe the 90"),
        ("d_model", 6, r"metadata\.json: d_model is 6"),
        ("num_layers", 3, r"metadata\.json: num_layers is 3"),
        ("num_layers", None, r"metadata\.json: num_layers is missing"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, key, value, match):
    write(tmp_path)
    edit(tmp_path / "metadata.json", lambda m: m.update({key: value}))
    with pytest.raises(UserError, match=match):
        store.open_store(str(tmp_path))


def test_legacy_index_with_a_repeated_row_is_refused(tmp_path):
    write(tmp_path, legacy=True)
    pairs = np.fromfile(tmp_path / "index.bin", "<u4").reshape(-1, 2)
    pairs[0] = pairs[1]
    pairs.tofile(tmp_path / "index.bin")
    with pytest.raises(UserError, match=r"index\.bin"):
        store.open_store(str(tmp_path))


def test_a_legacy_index_of_many_chunks_is_counted_and_checked_chunk_by_chunk():
    mix = np.random.default_rng(1)
    counts = dict(zip(mix.permutation(900)[:300].tolist(), mix.integers(1, 9, 300).tolist(), strict=True))
    pairs = mix.permutation(np.array([(i, r) for i, rows in counts.items() for r in range(rows)], "<u4"))
    assert foreign.parse_index(pairs.tobytes(), len(pairs), "index.bin") == sorted(counts.items())
    pairs[7, 1] = counts[int(pairs[7, 0])]  # beyond its chunk, though each row is named once
    with pytest.raises(UserError, match=r"index\.bin: does not describe"):
        foreign.parse_index(pairs.tobytes(), len(pairs), "index.bin")


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((40, 6), np.uint16, r"shape \[40, 6\]"),
        ((39, 5), np.uint16, r"shape \[39, 5\]"),
        ((40, 5), np.float32, "float32"),
    ],
)
def test_a_chunk_of_another_shape_or_type_is_found(tmp_path, shape, dtype, match):
    write(tmp_path)
    with h5py.File(tmp_path / "chunk_1.hdf5", "a") as file:
        del file["layer_10/targets"]
        file["layer_10/targets"] = np.zeros(shape, dtype)
    data = store.open_store(str(tmp_path))
    for look in (lambda: data.read(1, 0, 3, SITES), data.verify):
        with pytest.raises(UserError, match=rf"chunk_1\.hdf5: layer_10/targets .*{match}"):
            look()


def test_a_chunk_without_a_layer_is_found(tmp_path):
    write(tmp_path)
    with h5py.File(tmp_path / "chunk_1.hdf5", "a") as file:
        del file["layer_10"]
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: has no dataset layer_10/inputs"):
        store.open_store(str(tmp_path)).verify()


def test_cut_and_garbled_chunks_are_found(tmp_path):
    write(tmp_path, compression="gzip")
    raw = (tmp_path / "chunk_1.hdf5").read_bytes()
    (tmp_path / "chunk_1.hdf5").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"chunk_1\.hdf5: not a readable HDF5 file"):
        store.open_store(str(tmp_path)).verify()
    with h5py.File(tmp_path / "chunk_2.hdf5", "r") as file:
        where = file["layer_10/targets"].id.get_chunk_info(0)
    raw = bytearray((tmp_path / "chunk_2.hdf5").read_bytes())
    raw[where.byte_offset + 4 : where.byte_offset + where.size] = b"\0" * (where.size - 4)
    (tmp_path / "chunk_2.hdf5").write_bytes(raw)
    with pytest.raises(UserError, match=r"chunk_2\.hdf5: /layer_10/targets cannot be read"):
        store.open_store(str(tmp_path)).verify_chunk(2)


def test_url_without_manifest_is_refused():
    from xlc_ray import files

    files.write_bytes("memory://foreign-test/index.bin", b"x" * 16)
    with pytest.raises(UserError, match="local directory only"):
        store.open_store("memory://foreign-test")
