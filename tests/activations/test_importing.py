"""Activations of other programs' files become the rows of a store: every row once, at all sites together."""

import gc
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.runs import SITES as RUN_SITES
from tests.runs import small_run_in
from xlc_ray.activations import store
from xlc_ray.activations.importing import import_store
from xlc_ray.activations.tensorfiles import find_rows
from xlc_ray.config import UserError
from xlc_ray.training import train_alone

ROWS, WIDTH = 230, 6
DEFAULTS = {"held_out_fraction": 0.1, "chunk_tokens": 50, "dtype": None, "binary": None, "seed": 0}


def values(dtype=torch.float32):
    """Rows whose first column is their number, in any dtype."""
    found = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    found[:, 0] = torch.arange(ROWS)
    return found.to(dtype)


def bring(path, sites, **options):
    import_store(str(path), "tiny", list(sites.items()), **(DEFAULTS | options))
    data = store.open_store(str(path))
    data.verify()
    return data


def rows_of(data, site):
    return torch.cat(
        [store.decode(data.read(i, 0, n, [site])[site], data.dtype) for i, n in enumerate(data.chunk_rows)]
    )


def tensor_column(kind, x):
    if kind == "fixed_size_binary":
        raw = x.view(torch.uint8).numpy()
        return pa.array([row.tobytes() for row in raw], pa.binary(raw.shape[1]))
    flat = pa.array(x.numpy().reshape(-1))
    match kind:
        case "fixed_size_list":
            return pa.FixedSizeListArray.from_arrays(flat, WIDTH)
        case "list":
            return pa.ListArray.from_arrays(np.arange(0, x.numel() + 1, WIDTH, dtype=np.int32), flat)
        case "fixed_shape_tensor":
            return pa.FixedShapeTensorArray.from_numpy_ndarray(x.numpy())


def save(kind, directory, x):
    """x in a file of this kind: what --site takes."""
    file = str(directory / "file")
    match kind.split():
        case ["pt"]:
            torch.save(x, file + ".pt")
            return file + ".pt"
        case ["pt", "mapping"]:
            torch.save({"blocks.0": x, "other": x + 1}, file + ".pt")
            return file + ".pt:blocks.0"
        case ["pt", "parameter"]:
            torch.save(torch.nn.Parameter(x), file + ".pt")
            return file + ".pt"
        case [ending, "layers"]:
            layers = torch.stack([x + 1, x], dim=1)
            torch.save(layers, file + ".pt") if ending == "pt" else np.save(file + ".npy", layers.numpy())
            return f"{file}.{ending}:1"
        case ["pt", "3d"]:
            torch.save(x.reshape(23, 10, WIDTH), file + ".pt")
            return file + ".pt"
        case ["pt", "glob"]:
            for i in range(12):  # 2 before 10
                torch.save(x[i * 20 : (i + 1) * 20].clone(), f"{file}_{i}.pt")
            return file + "_*.pt"
        case ["npy"]:
            np.save(file + ".npy", x.numpy())
            return file + ".npy"
        case [ending, column]:
            table = pa.table({"tokens": pa.array(range(ROWS)), "acts": tensor_column(column, x)})
            if ending == "parquet":
                pq.write_table(table, file + ".parquet", row_group_size=70)
            else:
                make = pa.ipc.new_stream if ending == "stream" else pa.ipc.new_file
                with make(file + ".arrow", table.schema) as writer:
                    writer.write_table(table, max_chunksize=70)
            return f"{file}.{'parquet' if ending == 'parquet' else 'arrow'}:acts"


KINDS = ["pt", "pt mapping", "pt parameter", "pt layers", "pt 3d", "pt glob", "npy", "npy layers"]
COLUMNS = ["fixed_size_list", "list", "fixed_shape_tensor", "fixed_size_binary"]


@pytest.mark.parametrize("kind", KINDS + [f"{e} {c}" for e in ("parquet", "stream", "file") for c in COLUMNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_row_of_every_kind_of_file_is_kept_bit_for_bit(tmp_path, kind, dtype):
    x = values(dtype)
    binary = str(dtype).removeprefix("torch.") if "binary" in kind else None
    data = bring(tmp_path / "store", {"mlp_in.0": save(kind, tmp_path, x)}, binary=binary)
    assert data.dtype == str(dtype).removeprefix("torch.")
    assert data.chunk_rows == [50, 50, 50, 50, 7]
    held_out = store.open_store(str(tmp_path / "store/held_out"))
    found = torch.cat([rows_of(data, "mlp_in.0"), rows_of(held_out, "mlp_in.0")])
    order = found[:, 0].long()
    assert torch.equal(found, x.float()[order])
    for start in range(0, 207, 50):  # chunks hold consecutive rows, mixed; the last rows are held out
        assert sorted(order[start : min(start + 50, 207)].tolist()) == list(range(start, min(start + 50, 207)))
        assert order[start] != start or order[start + 1] != start + 1
    assert sorted(order[207:].tolist()) == list(range(207, ROWS))


@pytest.mark.parametrize("kind", ["pt", "npy", "parquet list", "stream list", "file list"])
def test_files_of_a_glob_are_open_only_while_they_are_read(tmp_path, kind):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    x = values()
    for i in range(20):
        (tmp_path / str(i)).mkdir()
        where = save(kind, tmp_path / str(i), x)
    gc.collect()
    before = opened()
    rows, _ = find_rows(where.replace("/19/", "/*/"), None)
    assert opened() == before
    blocks = rows.blocks()
    first = next(blocks)
    assert torch.equal(first, x[: len(first)])
    assert opened() <= before + 1
    assert len(first) + sum(map(len, blocks)) == 20 * ROWS
    assert opened() == before


def test_bfloat16_comes_through_bit_for_bit(tmp_path):
    x = values(torch.bfloat16)
    torch.save(x, tmp_path / "x.pt")
    table = pa.table({"acts": tensor_column("fixed_size_binary", x)})
    pq.write_table(table, tmp_path / "x.parquet")
    sites = {"mlp_in.0": str(tmp_path / "x.pt"), "mlp_out.0": str(tmp_path / "x.parquet")}
    data = bring(tmp_path / "store", sites, binary="bfloat16", held_out_fraction=0)
    assert data.dtype == "bfloat16"
    a, b = rows_of(data, "mlp_in.0"), rows_of(data, "mlp_out.0")
    assert torch.equal(a, b)
    assert torch.equal(a.sort(dim=0).values, x.float().sort(dim=0).values)


def test_sites_of_other_widths_and_files_stay_together(tmp_path):
    x = values(torch.float64)
    torch.save(x, tmp_path / "x.pt")
    np.save(tmp_path / "y.npy", torch.cat([x, -x], dim=1).float().numpy())
    sites = {"resid_post.2": str(tmp_path / "y.npy"), "mlp_in.0": str(tmp_path / "x.pt")}
    data = bring(tmp_path / "store", sites)
    assert data.manifest.sites == {"mlp_in.0": 6, "resid_post.2": 12}
    assert data.dtype == "float32"
    y = rows_of(data, "resid_post.2")
    assert torch.equal(y, torch.cat([rows_of(data, "mlp_in.0"), -rows_of(data, "mlp_in.0")], dim=1))
    np.testing.assert_allclose(data.statistics()["resid_post.2"].mean, y.double().mean(0), rtol=1e-12)


def test_an_interrupted_import_goes_on_and_other_files_are_refused(tmp_path):
    where = save("npy", tmp_path, values())
    bring(tmp_path / "store", {"mlp_in.0": where})
    whole = (tmp_path / "store/chunk_2.hdf5").read_bytes()
    for name in ("manifest.json", "chunk_2.hdf5"):
        (tmp_path / "store" / name).unlink()
    kept = (tmp_path / "store/chunk_1.hdf5").stat().st_mtime_ns
    bring(tmp_path / "store", {"mlp_in.0": where})
    assert (tmp_path / "store/chunk_2.hdf5").read_bytes() == whole
    assert (tmp_path / "store/chunk_1.hdf5").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="was made with chunk_tokens = 50, not 60"):
        bring(tmp_path / "store", {"mlp_in.0": where}, chunk_tokens=60)


def test_a_dictionary_is_trained_on_an_imported_store(tmp_path):
    config = small_run_in(tmp_path / "other")({"source.path": str(tmp_path / "store")})
    files = {site: save("npy", tmp_path, values()) for site in RUN_SITES}
    data = bring(tmp_path / "store", files)
    assert data.windows(0) is None
    last = train_alone(config)
    assert last["step"] == 12
    assert last["reconstruction"] == last["reconstruction"] < 100


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def mistakes(directory):
    """(what --site takes, what the error says)"""
    x = values()
    torch.save({"a": x, "b": x}, directory / "two.pt")
    torch.save(x[0], directory / "flat.pt")
    torch.save(x.reshape(23, 10, WIDTH), directory / "layers.pt")
    torch.save(x.long(), directory / "whole.pt")
    torch.save(Harmful(), directory / "code.pt")
    torch.save([x], directory / "list.pt")
    torch.save(x.to_sparse(), directory / "sparse.pt")
    torch.save({3: x}, directory / "numbered.pt")
    torch.save(x[:, :0].clone(), directory / "narrow.pt")
    np.savez(directory / "several.npz", x=x.numpy())
    (directory / "several.npz").rename(directory / "several.npy")
    (directory / "folder.pt").mkdir()
    for name in ("empty.parquet", "empty.npy", "empty.pt"):
        (directory / name).touch()
    pq.write_table(
        pa.table({"a": pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), WIDTH)}),
        directory / "cut.parquet",
    )
    raw = (directory / "cut.parquet").read_bytes()
    (directory / "cut.parquet").write_bytes(raw[:4] + bytes(400) + raw[404:])
    (directory / "text.csv").write_text("1,2")
    (directory / "text.npy").write_text("1,2")
    (directory / "text.arrow").write_text("1,2")
    ragged = pa.table({"acts": pa.array([[1.0, 2.0], [1.0]]), "gaps": pa.array([[1.0], None]), "n": pa.array([1, 2])})
    pq.write_table(ragged.append_column("raw", pa.array([b"abc", b"abc"], pa.binary(3))), directory / "odd.parquet")
    return {
        "none.pt": "none.pt: no such file",
        "two.pt": "two.pt: say which: FILE:COLUMN; allowed: a, b",
        "two.pt:c": "two.pt: c: FILE:COLUMN; allowed: a, b",
        "flat.pt": r"holds shape \[6\]; needs \[rows, width\]",
        "flat.pt:a": "a: holds no names, but Tensor; leave out :a",
        "layers.pt:10": r"10: of shape \[23, 10, 6\]; allowed: 0 to 9",
        "layers.pt:name": r"name: of shape \[23, 10, 6\]; allowed: 0 to 9",
        "whole.pt": "holds int64; allowed: bfloat16, float16, float32, float64",
        "code.pt": "code.pt: not tensors alone",
        "sparse.pt": "holds a sparse tensor; save it dense",
        "numbered.pt:2": "2: FILE:COLUMN; allowed: 3",
        "narrow.pt": "narrow.pt: rows of no numbers",
        "several.npy": "several arrays",
        "folder.pt": "folder.pt: no such file",
        "empty.parquet": r"empty.parquet: cannot be read as \.parquet: ",
        "empty.npy": r"empty.npy: cannot be read as \.npy: ",
        "empty.pt": r"empty.pt: (not tensors alone|cannot be read)",
        "cut.parquet": r"cut.parquet: cannot be read as \.parquet: ",
        "list.pt": r"holds list; needs \[rows, width\]",
        "text.csv": "unknown ending; allowed: .pt",
        "text.npy": "not an array",
        "text.arrow": "not an Arrow file or stream",
        "odd.parquet:acts": "has rows that are not 2 long",
        "odd.parquet:gaps": "has rows without a value",
        "odd.parquet:n": "holds int64; needs lists of numbers",
        "odd.parquet:raw": "say of what by --binary",
    }


def test_mistakes_are_one_line(tmp_path, capfd):
    for where, says in mistakes(tmp_path).items():
        with pytest.raises(UserError, match=says) as error:
            list(find_rows(str(tmp_path / where), None)[0].blocks())
        file = where.split(":")[0]
        assert str(error.value).count(f"{tmp_path / file}:") == 1, "named once"
    with pytest.raises(UserError, match="3 bytes are no whole number of float16"):
        find_rows(str(tmp_path / "odd.parquet:raw"), "float16")
    assert "run" not in capfd.readouterr().out, "nothing pickled is run"
    (found, _) = find_rows(str(tmp_path / "numbered.pt:3"), None)
    assert torch.equal(torch.cat(list(found.blocks())), values())
    with pytest.raises(UserError, match="--seed of 0 or more"):
        import_store(str(tmp_path / "store"), "tiny", [("mlp_in.0", "x.pt")], **DEFAULTS | {"seed": -1})
    assert not (tmp_path / "store").exists()


def test_a_single_row_is_for_training(tmp_path):
    torch.save(values()[:1].clone(), tmp_path / "x.pt")
    made = import_store(
        str(tmp_path / "store"), "tiny", [("mlp_in.0", str(tmp_path / "x.pt"))], **DEFAULTS | {"held_out_fraction": 0.9}
    )
    assert {held_out: manifest.tokens for held_out, manifest in made.items()} == {False: 1}


def test_sites_that_do_not_fit_together_are_named(tmp_path):
    x = values()
    torch.save(x, tmp_path / "a.pt")
    torch.save(x[:-1].clone(), tmp_path / "b.pt")
    torch.save(x[:, :-1].clone(), tmp_path / "c2.pt")
    torch.save(x, tmp_path / "c1.pt")
    a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"every site needs the same rows, one or more: mlp_in\.0 230, mlp_out\.0 229"):
        bring(tmp_path / "store", {"mlp_in.0": a, "mlp_out.0": b})
    with pytest.raises(UserError, match=r"c2\.pt: rows of 5 torch\.float32, .*c1\.pt has 6"):
        find_rows(str(tmp_path / "c*.pt"), None)
    with pytest.raises(UserError, match=r"site 'mlp\.0': not a site"):
        bring(tmp_path / "store", {"mlp.0": a})
    with pytest.raises(UserError, match="two of --site have one name"):
        import_store(str(tmp_path / "store"), "tiny", [("mlp_in.0", a), ("mlp_in.0", b)], **DEFAULTS)
    assert not (tmp_path / "store").exists()
