"""bfloat16 in fewer bytes: every bit comes back, from anywhere, and what was damaged is said."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from tests.activations.build import SITES, arrays, make
from tests.runs import SITES as RUN_SITES
from tests.runs import final_state, small_run_in
from xlc_ray.activations import chunkfile, lossless, store
from xlc_ray.config import UserError
from xlc_ray.config.sources import HttpSource
from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running
from xlc_ray.training import train_alone

ROWS = [150, 64, 1]


@pytest.fixture(params=["local", "memory", "server"])
def data(request, tmp_path):
    path = str(tmp_path / "squeezed") if request.param != "memory" else "memory://lossless-test"
    made = make(path, ROWS, dtype=lossless.DTYPE)
    if request.param != "server":
        yield made
        return
    with running(str(tmp_path), None, Terms(1 << 26, 1 << 24, 1 << 18), "127.0.0.1", 0) as url:
        yield store.open_store(HttpSource(url=url, dataset_id="squeezed").path)


def test_any_rows_in_any_order_are_the_same_bits(data):
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 3, 300)
    row = (rng.random(300) * np.array(ROWS)[chunk]).astype(int)
    row[:3], chunk[:3] = (149, 149, 0), (0, 0, 2)  # twice the same, and a chunk of one row
    found = data.gather(chunk, row, list(SITES))
    first = np.cumsum([0, *ROWS])
    whole = [arrays(n, int(start)) for n, start in zip(ROWS, first, strict=False)]
    for site in SITES:
        wanted = np.stack([whole[c][site][r] for c, r in zip(chunk, row, strict=True)])
        assert found[site].dtype == np.uint16
        assert np.array_equal(found[site], wanted)
        assert store.decode(found[site], data.dtype).dtype == torch.float32
    assert data.gather(chunk[:0], row[:0], ["mlp_in.0"])["mlp_in.0"].shape == (0, SITES["mlp_in.0"])
    data.verify()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_every_pattern_of_bits_survives(tmp_path, rows):
    """NaN, infinities and denormals too: 65,536 of them in all."""
    values = np.random.default_rng(rows).permutation(np.arange(65536, dtype=np.uint16))[: rows * 320].reshape(rows, -1)
    record = chunkfile.write(str(tmp_path), 0, {"mlp_in.0": lossless.squeeze(values)})
    raw = (tmp_path / record.file).read_bytes()
    manifest = make(tmp_path / "other", [rows], dtype=lossless.DTYPE).manifest.model_copy(update={"chunks": (record,)})
    out = {"mlp_in.0": np.empty_like(values)}
    at = np.arange(rows)
    lossless.fill(lambda spans: [raw[s.start : s.stop] for s in spans], "", manifest, 0 * at, at, at, out)
    assert np.array_equal(out["mlp_in.0"], values)


def test_numbers_like_activations_take_seven_tenths():
    values = torch.randn(4000, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 256)
    plain = store.encode(values, "bfloat16", "")
    squeezed = lossless.squeeze(plain)
    assert 0.6 < (squeezed.values.nbytes + squeezed.side.nbytes) / plain.nbytes < 0.76


def test_a_run_on_it_is_the_run_on_bfloat16(tmp_path):
    states = []
    for dtype in ("bfloat16", lossless.DTYPE):
        folder = tmp_path / dtype
        make(folder / "store", [90, 90, 23], dtype=dtype, sites=RUN_SITES)
        config = small_run_in(tmp_path / "made")({"source.path": str(folder / "store"), "out": str(folder / "run")})
        train_alone(config)
        states.append(final_state(config))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_what_was_altered_names_the_file(tmp_path):
    data = make(tmp_path, [150], dtype=lossless.DTYPE)
    record, file = data.manifest.chunks[0], tmp_path / "chunk_0.hdf5"
    whole = file.read_bytes()
    start = record.offsets["mlp_out.0"] + 64 * SITES["mlp_out.0"]  # behind the low bytes: Zstandard's own header
    file.write_bytes(whole[:start] + b"\0\0\0\0" + whole[start + 4 :])
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: altered: mlp_out\.0 cannot be unpacked .*; remove this file"):
        data.read(0, 0, 5, list(SITES))
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: altered"):
        data.verify()
    table = record.sides["mlp_out.0"]
    file.write_bytes(whole[: table + 8] + b"\xff" * 7 + b"\x7f" + whole[table + 16 :])
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: altered: blocks of mlp_out\.0 lie outside; remove this file"):
        data.read(0, 0, 5, list(SITES))
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: cut or altered"):
        data.read(0, 0, 5, list(SITES))


def test_other_programs_find_nothing_that_they_cannot_read(tmp_path):
    make(tmp_path, [40], dtype=lossless.DTYPE)
    with h5py.File(tmp_path / "chunk_0.hdf5") as file:
        assert sorted(file) == ["zstd"]
    assert not any((tmp_path / name).exists() for name in ("index.bin", "metadata.json", "norm_stats.json"))
