"""Eight bits a number: errors within half a step, outliers untouched, the loss that is stated is the loss there is."""

import h5py
import numpy as np
import pytest
import torch

from tests.activations.build import SITES, arrays, identity, make
from tests.runs import SITES as RUN_SITES
from tests.runs import final_state, small_run_in
from xlc_ray.activations import chunkfile, compact, store
from xlc_ray.config import UserError
from xlc_ray.config.sources import HttpSource
from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running
from xlc_ray.training import train_alone

WIDTH = 24


def rough(rows, seed=0):
    """Channels of very different means and deviations; three rows of huge norm, one huge number, a constant channel."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, WIDTH)) * np.geomspace(1e-3, 30, WIDTH) + np.linspace(-50, 50, WIDTH)
    x[rng.choice(rows, min(3, rows // 1000), replace=False)] *= 800
    x[rows // 2, 5] = 1e4
    x[:, 7] = 0.1
    return x.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000, 1001, 5000])
def test_errors_are_within_half_a_step_and_outliers_exact(rows):
    x = rough(rows)
    packed = compact.pack(x)
    assert packed.values.dtype == np.int8
    back = compact.unpack(packed)
    scale = packed.side[4 * WIDTH : 8 * WIDTH].view("<f4")
    tolerance = scale / 2 * (1 + 1e-4) + np.abs(x).max(axis=0) * 1e-6  # half a step, and float32's own
    exact = back == x
    assert (np.abs(back - x) <= np.where(exact, 0, tolerance)).all()
    assert (back[:, 7] == x[:, 7]).all()
    allowed = -(-rows // 1000)
    kept = (len(packed.side) - 8 * WIDTH - 4 * (-(-rows // 64) + 1)) // 12
    assert kept <= allowed * WIDTH
    if rows >= 1000:
        long = np.abs(x).max(axis=1) > 5000
        assert 1 <= long.sum() <= 4
        assert (back[rows // 2, 5], kept > 0) == (1e4, True)


def test_a_few_outliers_do_not_coarsen_the_rest():
    x = rough(4000)
    back = compact.unpack(compact.pack(x))
    plain = np.delete(np.arange(4000), np.flatnonzero(np.abs(x).max(axis=1) > 1000))
    varying = [c for c in range(WIDTH) if c != 7]
    rest = x[plain][:, varying]
    lost = ((back[plain][:, varying] - rest) ** 2).sum(0) / ((rest - rest.mean(0)) ** 2).sum(0)
    assert lost.max() < 2e-4
    by_largest = np.abs(x).max(axis=0)[varying] / 127  # a scale that reaches to all rows
    assert (by_largest**2 / 12 / rest.var(0)).min() > 0.5


def test_outliers_on_one_side_and_beside_a_constant(tmp_path):
    """All outliers of a channel to one side, which would draw a mean to them; small ones of a channel without scale."""
    x = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    x[:3, 0] += 1e5
    x[:, 1] = 0.25
    x[[7, 2500], 1] = [0.250001, -3]
    x[:, 2] = 0
    x[9, 2] = 1e-30
    back = compact.unpack(compact.pack(x))
    assert np.array_equal(back[:, 1:], x[:, 1:])
    assert np.array_equal(back[:3, 0], x[:3, 0])
    assert np.abs(back - x).max() < 0.02


def whole(path, chunks, sites):
    """A store of int8 of these chunks, {site: float32 [rows, width]} each."""
    known = identity(sites, "int8")
    store.begin(path, known)
    for index, chunk in enumerate(chunks):
        store.write_chunk(path, index, chunk, "int8")
    store.write_plan(path, [len(next(iter(chunk.values()))) for chunk in chunks])
    store.finish(path, known)
    return store.open_store(path)


@pytest.fixture(params=["local", "memory", "server"])
def place(request, tmp_path):
    if request.param == "server":
        with running(str(tmp_path), None, Terms(1 << 26, 1 << 24, 1 << 18), "127.0.0.1", 0) as url:
            yield HttpSource(url=url, dataset_id="tiny/packed").path
    else:
        yield str(tmp_path) if request.param == "local" else "memory://compact-test"


def test_any_rows_in_any_order_are_what_the_chunk_holds(place):
    sites = {"mlp_in.0": WIDTH, "resid_post.0": WIDTH}
    chunks = [{site: rough(n, seed + 10 * i) for seed, site in enumerate(sites)} for i, n in enumerate((1500, 700, 1))]
    data = whole(place, chunks, sites)
    expected = [{site: compact.unpack(compact.pack(x)) for site, x in chunk.items()} for chunk in chunks]
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 3, 400)
    row = (rng.random(400) * np.array(data.chunk_rows)[chunk]).astype(int)
    row[:2], chunk[:2] = 750, 0  # the planted outlier, twice
    found = data.gather(chunk, row, list(sites))
    for site in sites:
        wanted = np.stack([expected[c][site][r] for c, r in zip(chunk, row, strict=True)])
        assert np.array_equal(found[site], wanted)
    assert found["mlp_in.0"][0, 5] == 1e4
    assert torch.equal(store.decode(found["mlp_in.0"], "int8"), torch.from_numpy(found["mlp_in.0"]))
    assert data.gather(chunk[:0], row[:0], ["mlp_in.0"])["mlp_in.0"].shape == (0, WIDTH)
    data.verify()


def test_the_loss_that_is_stated_is_that_of_what_is_read(tmp_path):
    chunks = [{"mlp_in.0": rough(1200, seed)} for seed in range(2)]
    data = whole(str(tmp_path), chunks, {"mlp_in.0": WIDTH})
    x = np.concatenate([chunk["mlp_in.0"] for chunk in chunks]).astype(np.float64)
    kept = np.concatenate([data.read(i, 0, 1200, ["mlp_in.0"])["mlp_in.0"] for i in range(2)]).astype(np.float64)
    lost = ((x - kept) ** 2).sum() / ((kept - kept.mean(0)) ** 2).sum()
    assert data.manifest.lost["mlp_in.0"] == pytest.approx(lost, rel=1e-5)
    assert 0 < lost < 1e-4
    np.testing.assert_allclose(data.statistics()["mlp_in.0"].mean, kept.mean(0), rtol=1e-12)
    assert make(tmp_path / "exact", [9]).manifest.lost == {}


def test_bytes_a_token_are_half_of_bfloat16(tmp_path):
    x = np.random.default_rng(0).standard_t(3, (8000, 64)).astype(np.float32)  # heavy tails
    path = str(tmp_path)
    packed = chunkfile.write(path, 0, {"mlp_in.0": compact.pack(x)}).bytes
    plain = chunkfile.write(path, 1, {"mlp_in.0": store.encode(torch.from_numpy(x), "bfloat16", "")}).bytes
    assert 0.5 < packed / plain < 0.515


def test_other_programs_find_nothing_to_take_for_numbers(tmp_path):
    make(tmp_path, [40], dtype="int8")
    with h5py.File(tmp_path / "chunk_0.hdf5") as file:
        assert sorted(file) == ["int8"]
        assert file["int8/mlp_in.0/values"].dtype == np.int8
    assert not any((tmp_path / name).exists() for name in ("index.bin", "metadata.json", "norm_stats.json"))


def test_training_reads_what_unpacking_gives(tmp_path):
    """A run on int8 and one on the same numbers in float32 are the same run."""
    settings = small_run_in(tmp_path / "other")
    rows = [90, 90, 23]
    chunks = [arrays(n, 90 * i, "float32", RUN_SITES) for i, n in enumerate(rows)]
    data = whole(str(tmp_path / "int8"), chunks, RUN_SITES)
    known = identity(RUN_SITES, "float32")
    plain = str(tmp_path / "float32")
    store.begin(plain, known)
    for index, n in enumerate(rows):
        store.write_chunk(plain, index, data.read(index, 0, n, list(RUN_SITES)), "float32")
    store.write_plan(plain, rows)
    store.finish(plain, known)
    states = []
    for name in ("int8", "float32"):
        config = settings({"source.path": str(tmp_path / name), "out": str(tmp_path / f"run-{name}")})
        train_alone(config)
        states.append(final_state(config))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())


def test_not_finite_and_altered(tmp_path):
    values = arrays(50, 0, "int8")
    values["mlp_out.0"][3, 2] = np.nan
    with pytest.raises(UserError, match=r"chunk 4: mlp_out\.0 has values that are not finite"):
        store.write_chunk(str(tmp_path / "bad"), 4, values, "int8")
    data = make(tmp_path / "store", [50], dtype="int8")
    chunk = tmp_path / "store/chunk_0.hdf5"
    raw = bytearray(chunk.read_bytes())
    raw[data.manifest.chunks[0].sides["mlp_out.0"] + 1] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: altered"):
        data.verify()
    chunk.write_bytes(raw[:-5])
    with pytest.raises(UserError, match=r"chunk_0\.hdf5: cut or altered"):
        data.read(0, 0, 5, list(SITES))
