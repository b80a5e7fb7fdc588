import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.activations.build import SITES, arrays, chunk_text, identity, make, row_ids, row_tokens, write
from xlc_ray import files
from xlc_ray.activations import chunkfile, reading, store
from xlc_ray.activations.manifest import Moments
from xlc_ray.config import UserError, load_config

ROWS = [50, 50, 13]


def everything(data):
    read = [data.read(i, 0, n, list(SITES)) for i, n in enumerate(data.chunk_rows)]
    return {site: store.decode(np.concatenate([r[site] for r in read]), data.dtype) for site in SITES}


def test_every_bfloat16_pattern_survives_the_disk(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 256)  # -0, inf, NaN payloads, subnormals: all there are
    record = chunkfile.write(str(tmp_path), 0, {"mlp_in.0": bits})
    out = {"mlp_in.0": np.empty_like(bits)}
    rows = np.arange(256)
    reading.scatter(str(tmp_path / "chunk_0.hdf5"), record, {"mlp_in.0": 256}, "bfloat16", rows, rows, out)
    assert np.array_equal(out["mlp_in.0"], bits)
    values = store.decode(out["mlp_in.0"], "bfloat16")
    assert torch.equal(values.view(torch.int32), torch.from_numpy(bits.astype(np.int32) << 16))


def test_encode_rounds_once_and_keeps_special_values():
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 1.00390625, 3.14159, float("nan")])
    back = store.decode(store.encode(values, "bfloat16", "x"), "bfloat16")
    assert torch.equal(back.view(torch.int32), values.bfloat16().float().view(torch.int32))


def test_float16_that_would_overflow_is_refused():
    with pytest.raises(UserError, match=r"float16 cannot hold 7e\+04 at mlp_out\.2; allowed: bfloat16"):
        store.encode(torch.tensor([1.0, -70000.0]), "float16", "mlp_out.2")
    assert store.encode(torch.tensor([float("inf")]), "float16", "x")[0] == np.inf


def test_numbers_read_as_another_type_are_a_bug():
    with pytest.raises(AssertionError):
        store.decode(np.zeros(3, np.uint16), "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_was_written_is_read_in_any_order(tmp_path, dtype, where):
    data = make(tmp_path if where == "local" else f"memory://store-test/{dtype}", ROWS, dtype)
    assert data.chunk_rows == ROWS
    chunk, row = np.array([2, 0, 1, 0, 2, 1, 0]), np.array([12, 49, 3, 0, 0, 49, 0])
    found = {site: store.decode(v, dtype) for site, v in data.gather(chunk, row, list(SITES)).items()}
    for site in SITES:
        assert row_ids(found[site]) == (chunk * 50 + row).tolist()
    expected = arrays(50, 50, dtype)
    assert all(np.array_equal(data.read(1, 7, 31, [s])[s], expected[s][7:31]) for s in SITES)
    data.verify()


def test_rows_beyond_a_chunk_are_a_bug(tmp_path):
    data = make(tmp_path, ROWS)
    for start, stop in ((40, 51), (-1, 3)):
        with pytest.raises(AssertionError):
            data.read(0, start, stop, ["mlp_in.0"])


def test_unknown_site_names_those_there(tmp_path):
    with pytest.raises(UserError, match=r"no site mlp_in\.7; allowed: mlp_in\.0, mlp_out\.0, resid_post\.0"):
        make(tmp_path, [5]).read(0, 0, 1, ["mlp_in.7"])


def test_statistics_equal_numpy_on_the_concatenation(tmp_path):
    data = make(tmp_path, ROWS)
    for site, values in everything(data).items():
        rows, found = values.double().numpy(), data.statistics()[site]
        assert found.count == len(rows) == sum(ROWS)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0, ddof=1), rtol=1e-12)
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


def test_moments_merge_in_any_grouping_far_from_zero():
    rows = np.random.default_rng(0).normal(1e6, 1e-2, (700, 3))  # where a sum of squares would lose everything
    parts = np.split(rows, [1, 40, 333])
    left = Moments.of(parts[0])
    for part in parts[1:]:
        left = left.merge(Moments.of(part))
    right = Moments.of(parts[3]).merge(Moments.of(parts[2])).merge(Moments.of(parts[0]).merge(Moments.of(parts[1])))
    for found in (left.statistics(), right.statistics()):
        np.testing.assert_allclose(found.std, rows.std(0, ddof=1), rtol=1e-6)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)


def test_one_row_has_no_spread(tmp_path):
    assert (make(tmp_path, [1]).statistics()["mlp_in.0"].std == 0).all()


def test_layout_is_that_of_crosslayer_coding(tmp_path):
    make(tmp_path, ROWS)
    with h5py.File(tmp_path / "chunk_1.hdf5") as file:
        assert sorted(file) == ["layer_0", "sites"]
        assert sorted(file["layer_0"]) == ["inputs", "targets"]
        assert file["layer_0/inputs"].dtype == np.uint16
        assert np.array_equal(file["layer_0/targets"][:], arrays(50, 50)["mlp_out.0"])
        assert file["layer_0/inputs"].chunks is None
    index = np.fromfile(tmp_path / "index.bin", "<i4").reshape(-1, 4)
    assert index.tolist() == [[0, 50, 0, 0], [1, 50, 50, 0], [2, 13, 100, 0]]
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert {"num_layers": 1, "d_model": 6, "total_tokens": 113}.items() <= metadata.items()
    stats = json.loads((tmp_path / "norm_stats.json").read_text())
    assert list(stats) == ["0"]
    assert len(stats["0"]["targets"]["std"]) == 6


def test_without_its_manifest_a_store_is_still_a_crosslayer_coding_dataset(tmp_path):
    sites = {"mlp_in.0": 6, "mlp_out.0": 6}
    ours = make(tmp_path, ROWS, sites=sites)
    (tmp_path / "manifest.json").unlink()
    theirs = store.open_store(str(tmp_path))
    assert theirs.manifest.fingerprint is None
    for chunk, rows in enumerate(ROWS):
        a, b = (s.read(chunk, 0, rows, list(sites)) for s in (ours, theirs))
        assert all(np.array_equal(a[site], b[site]) for site in sites)
    np.testing.assert_array_equal(theirs.statistics()["mlp_in.0"].std, ours.statistics()["mlp_in.0"].std)


def test_rows_trace_back_to_their_text(tmp_path):
    data, expected = make(tmp_path, ROWS), chunk_text(1, 50)
    found = data.windows(1)
    assert np.array_equal(row_tokens(found), row_tokens(expected))
    assert np.array_equal(found.windows.tokens, expected.windows.tokens)
    (tmp_path / "text/chunk_1.npz").unlink()
    with pytest.raises(UserError, match=r"text/chunk_1\.npz: missing"):
        data.windows(1)


# resuming ------------------------------------------------------------------------------------------------------------


def unfinished(path):
    store.begin(path, identity(SITES))
    for index, (rows, first) in enumerate(zip(ROWS, (0, 50, 100), strict=True)):
        write(path, index, rows, first)
    store.write_plan(path, ROWS)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_chunk_is_complete_by_record_and_size(tmp_path, where):
    path = str(tmp_path) if where == "local" else "memory://store-test/unfinished"
    assert store.missing_chunks(path, 3) == [0, 1, 2]
    unfinished(path)
    assert store.missing_chunks(path, 4) == [3]
    files.remove(files.join(path, "records/chunk_0.json"))
    files.write_bytes(files.join(path, "chunk_2.hdf5"), files.read_bytes(files.join(path, "chunk_2.hdf5"))[:-1])
    assert store.missing_chunks(path, 3) == [0, 2]
    with pytest.raises(UserError, match=r"2 of 3 chunks are missing \(0, 2\)"):
        store.finish(path, identity(SITES))
    with pytest.raises(UserError, match="not complete; generate again"):
        store.open_store(path)
    write(path, 0, 50, 0)
    write(path, 2, 13, 100)
    assert store.finish(path, identity(SITES)).tokens == 113
    store.open_store(path).verify()


def test_a_store_at_a_url_is_finished_by_three_requests_a_chunk(monkeypatch):
    path, chunks, asked = "memory://store-test/requests", 40, []
    store.begin(path, identity(SITES))
    for index in range(chunks):
        write(path, index, 2, 2 * index)
    store.write_plan(path, [2] * chunks)
    for name in ("cat_file", "info", "ls"):
        real = getattr(MemoryFileSystem, name)

        def counted(self, place, *args, name=name, real=real, **options):
            asked.append(f"{name} {place}")
            return real(self, place, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    assert store.missing_chunks(path, chunks) == []
    assert len(asked) <= 2 * chunks + 1
    asked.clear()
    chunks_of = store.finish(path, identity(SITES)).chunks
    assert [chunk.index for chunk in chunks_of] == list(range(chunks))
    of_chunks = [one for one in asked if "chunk_" in one]
    assert len(of_chunks) == len(set(of_chunks)) == 3 * chunks, "record, size and moments, each once"
    monkeypatch.undo()
    rows = np.concatenate([arrays(2, 2 * i, "float32")["mlp_in.0"] for i in range(chunks)])
    np.testing.assert_allclose(store.open_store(path).statistics()["mlp_in.0"].mean[1], rows.mean(0)[1], rtol=1e-12)


def test_a_chunk_written_again_is_the_same_file(tmp_path):
    unfinished(str(tmp_path))
    before = (tmp_path / "chunk_1.hdf5").read_bytes()
    write(str(tmp_path), 1, 50, 50)
    assert (tmp_path / "chunk_1.hdf5").read_bytes() == before


def test_a_writer_that_dies_leaves_no_chunk_and_finish_sweeps(tmp_path, monkeypatch):
    unfinished(str(tmp_path))
    (tmp_path / "records/chunk_1.json").unlink()
    (tmp_path / "chunk_1.hdf5").unlink()
    monkeypatch.setattr(chunkfile, "checksum", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(str(tmp_path), 1, 50, 50)
    monkeypatch.undo()
    assert not (tmp_path / "chunk_1.hdf5").exists()
    (tmp_path / ".chunk_killed").mkdir()
    write(str(tmp_path), 1, 50, 50)
    store.finish(str(tmp_path), identity(SITES))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_text_without_a_plan_is_not_complete(tmp_path):
    store.begin(str(tmp_path), identity(SITES))
    assert store.read_plan(str(tmp_path)) is None
    with pytest.raises(UserError, match="text is not complete"):
        store.finish(str(tmp_path), identity(SITES))


def test_other_settings_into_the_same_path_are_refused(tmp_path):
    make(tmp_path, [5])
    store.begin(str(tmp_path), identity(SITES))  # the same again is fine
    with pytest.raises(UserError, match=r"made with text\.context = 8, not 16"):
        store.begin(str(tmp_path), identity(SITES, text={"dataset": "novels.txt", "split": "train", "context": 16}))
    (tmp_path / "identity.json").unlink()
    with pytest.raises(UserError, match="another origin"):
        store.begin(str(tmp_path), identity(SITES))


def test_of_several_differences_a_size_is_named_last(tmp_path):
    store.begin(str(tmp_path), identity(SITES, bytes={"model.name": 6}))
    with pytest.raises(UserError, match="made with seed = None, not 1"):
        store.begin(str(tmp_path), identity(SITES, bytes={"model.name": 7}, seed=1))
    with pytest.raises(UserError, match=r"made with another model\.name: bytes of its files = 6, not 7; choose"):
        store.begin(str(tmp_path), identity(SITES, bytes={"model.name": 7}))


@pytest.mark.parametrize("size", [0, 3, 200, -1])
def test_text_and_moments_that_were_cut_name_their_file(tmp_path, size):
    unfinished(str(tmp_path))
    store.write_text(str(tmp_path), chunk_text(1, 50))
    for name in ("text/chunk_1.npz", "moments/chunk_1.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(UserError, match=r"text/chunk_1\.npz: cannot be read as \.npz"):
        store.read_text(str(tmp_path), 1)
    with pytest.raises(UserError, match=r"moments/chunk_1\.npz: cannot be read as \.npz"):
        store.finish(str(tmp_path), identity(SITES))


def test_identity_holds_what_decides_the_content_and_nothing_else():
    config = load_config("configs/quickstart.yaml")

    def mark(changes, held_out=False):
        return store.fingerprint(store.identity(config.override(changes), SITES, held_out))

    same = {"text.streaming": True, "generate.batch_windows": 3, "train.lr": 1.0, "out": "elsewhere"}
    assert mark(same) == mark({})
    changes = [
        {"seed": 1},
        {"model.dtype": "bfloat16"},
        {"model.name": "other"},
        {"text.context": 64},
        {"text.ignore_first": 0},
        {"text.held_out_fraction": 0.1},
        {"text.windows": "one_per_document"},
        *({"text.dataset": None, "text.mixture": [{"dataset": "a"}, {"dataset": "b", "weight": w}]} for w in (1, 2)),
        {"generate.tokens": 7},
        {"generate.dtype": "float32"},
        {"generate.chunk_tokens": 512},
        {"generate.documents_per_task": 2},
    ]
    assert len({mark(change) for change in changes} | {mark({}), mark({}, held_out=True)}) == len(changes) + 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tmp_path, bad):
    values = arrays(5, 0, "float32")
    values["mlp_out.0"][3, 2] = bad
    with pytest.raises(UserError, match=r"chunk 4: mlp_out\.0 has values that are not finite"):
        store.write_chunk(str(tmp_path), 4, values, "float32")
    assert store.missing_chunks(str(tmp_path), 5) == [0, 1, 2, 3, 4]


# damage --------------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[:-10])
    elif how == "altered":
        raw[-3] ^= 1
        path.write_bytes(raw)
    elif how == "width":
        path.unlink()
        with h5py.File(path, "w") as file:
            for site, width in SITES.items():
                file[chunkfile.dataset_name(site)] = np.zeros((50, width + 1), np.uint16)


@pytest.mark.parametrize(("how", "match"), [("missing", "missing"), ("cut", "cut"), ("width", "(shape|altered)")])
def test_damage_that_shows_is_found_on_reading(tmp_path, how, match):
    data = make(tmp_path, ROWS)
    data.read(1, 0, 5, list(SITES))  # an old map must not be served afterwards
    damage(tmp_path / "chunk_1.hdf5", how)
    for look in (lambda: data.read(1, 0, 5, list(SITES)), data.verify):
        with pytest.raises(UserError, match=rf"chunk_1\.hdf5: .*{match}"):
            look()


def test_altered_bytes_are_found_by_verify(tmp_path):
    data = make(tmp_path, ROWS)
    damage(tmp_path / "chunk_2.hdf5", "altered")
    with pytest.raises(UserError, match=r"chunk_2\.hdf5: altered: .* remove this file and run what made the store"):
        data.verify()
    assert store.missing_chunks(data.path, len(ROWS)) == [], "by its size it is complete"
    damage(tmp_path / "chunk_2.hdf5", "missing")
    assert store.missing_chunks(data.path, len(ROWS)) == [2]


@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_damage_at_a_url(how):
    path = f"memory://store-test/damage-{how}"
    data = make(path, ROWS)
    name, raw = files.join(path, "chunk_1.hdf5"), files.read_bytes(files.join(path, "chunk_1.hdf5"))
    files.remove(name)
    if how != "missing":
        files.write_bytes(name, raw[: len(raw) // 2] if how == "cut" else raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match=how):
        data.verify()
    if how != "altered":
        with pytest.raises(UserError, match=how):
            data.read(1, 0, 50, list(SITES))


def test_a_replaced_chunk_is_never_served_from_an_old_map(tmp_path):
    data = make(tmp_path, ROWS)
    data.read(1, 0, 5, ["mlp_in.0"])
    write(str(tmp_path), 1, 50, 1000)
    assert row_ids(store.decode(data.read(1, 0, 5, ["mlp_in.0"])["mlp_in.0"], "bfloat16")) == list(range(1000, 1005))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("manifest.json", "{", "not JSON"),
        ("manifest.json", "[]", "JSON object"),
        ("manifest.json", '{"format_version": 99}', "newer"),
        ("manifest.json", '{"format_version": 1}', "sites: Field required"),
        ("statistics.json", None, "missing"),
        ("statistics.json", "{}", r"mlp_in\.0 is missing"),
    ],
)
def test_damaged_descriptions_name_their_file(tmp_path, name, content, match):
    make(tmp_path, [5])
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: .*{match}"):
        store.open_store(str(tmp_path))


def test_no_store_is_said_so(tmp_path):
    with pytest.raises(UserError, match="no activations here"):
        store.open_store(str(tmp_path / "nowhere"))


# scale ---------------------------------------------------------------------------------------------------------------


def test_many_chunks_keep_few_files_open(tmp_path):
    sites = {"mlp_in.0": 2}
    data = make(tmp_path, [1] * 90, sites=sites)
    found = data.gather(np.arange(90), np.zeros(90, np.int64), ["mlp_in.0"])["mlp_in.0"]
    assert row_ids(store.decode(found, "bfloat16")) == list(range(90))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(tmp_path)) <= 64
    assert reading._opened.cache_info().currsize <= 64


def test_a_store_is_plain_data(tmp_path):
    data = make(tmp_path, ROWS)
    data.read(0, 0, 1, ["mlp_in.0"])
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data
    assert np.array_equal(copy.read(2, 0, 13, ["mlp_in.0"])["mlp_in.0"], data.read(2, 0, 13, ["mlp_in.0"])["mlp_in.0"])
