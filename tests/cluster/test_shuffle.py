"""jobs/shuffle.py on Ray: the same store at any number of workers, and after an interruption."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.activations import test_foreign as foreign
from tests.activations.build import SITES, make
from xlc_ray.activations.store import open_store
from xlc_ray.cluster.shuffle import _copy_held_out, shuffle
from xlc_ray.config import UserError
from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running

pytestmark = pytest.mark.cluster

ROWS = [50, 50, 50, 13]


@pytest.fixture
def old(tmp_path):
    make(tmp_path / "old/held_out", [9])
    return make(tmp_path / "old", ROWS)


def contents(path: Path) -> dict[str, str]:
    """Digests of chunk files and texts."""
    found = [*path.rglob("chunk_*.hdf5"), *path.rglob("chunk_*.npz")]
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def test_workers_and_interruptions_change_nothing(cluster, old, tmp_path):
    one = shuffle(old.path, str(tmp_path / "one"), seed=3, chunk_tokens=40, workers=1)
    shuffle(old.path, str(tmp_path / "three"), seed=3, chunk_tokens=40, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [chunk.rows for chunk in one.chunks] == [40, 40, 40, 40, 3]
    assert not (tmp_path / "one/parts").exists()
    held_out = open_store(str(tmp_path / "one/held_out"))
    held_out.verify()
    assert held_out.manifest == open_store(f"{old.path}/held_out").manifest
    # Cut off in the second pass, with its parts gone too: what is missing is made again.
    whole = contents(tmp_path / "three")
    for name in ("manifest.json", "chunk_1.hdf5", "records/chunk_3.json"):
        (tmp_path / "three" / name).unlink()
    kept = (tmp_path / "three/chunk_2.hdf5").stat().st_mtime_ns
    shuffle(old.path, str(tmp_path / "three"), seed=3, chunk_tokens=40)
    assert contents(tmp_path / "three") == whole
    assert (tmp_path / "three/chunk_2.hdf5").stat().st_mtime_ns == kept
    open_store(str(tmp_path / "three")).verify()


@pytest.mark.parametrize("kind", ["ours", "crosslayer_coding"])
@pytest.mark.parametrize("served", [False, True])
def test_the_held_out_part_is_copied_whole_from_directories_and_servers(tmp_path, kind, served):
    held_out = tmp_path / "root/old/held_out"
    if kind == "ours":
        make(held_out, [9, 4])
    else:
        held_out.mkdir(parents=True)
        foreign.write(held_out)
        foreign.edit(held_out / "metadata.json", lambda known: known.update(dtype="bfloat16"))
    with running(str(tmp_path / "root"), None, Terms(1 << 26, 1 << 24, 1 << 18), "127.0.0.1", 0) as url:
        old = f"xlc+{url}/old" if served else str(held_out.parent)
        _copy_held_out(old, str(tmp_path / "new"))
        _copy_held_out(f"{old}/held_out", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    new = tmp_path / "new/held_out"
    here, there = ({f.relative_to(d): f.read_bytes() for d in (d,) for f in d.rglob("*") if f.is_file()}
                   for d in (held_out, new))  # fmt: skip
    assert there == here
    open_store(str(new)).verify()
    (new / "chunk_0.hdf5").unlink()
    _copy_held_out(str(held_out.parent), str(tmp_path / "new"))
    assert not (new / "chunk_0.hdf5").exists(), "complete, it is left alone"
    (held_out / "chunk_1.hdf5").unlink()
    with pytest.raises(UserError, match=r"held_out/chunk_1\.hdf5: the chunk is missing"):
        _copy_held_out(str(held_out.parent), str(tmp_path / "other"))


def test_mistakes_are_named(cluster, old, tmp_path):
    with pytest.raises(UserError, match="--seed: -1; allowed: 0 or more"):
        shuffle(old.path, str(tmp_path / "new"), -1)
    with pytest.raises(UserError, match="--workers: 0; allowed: 1 or more"):
        shuffle(old.path, str(tmp_path / "new"), 0, workers=0)
    assert not (tmp_path / "new").exists()
    shuffle(old.path, str(tmp_path / "new"), seed=3)
    assert shuffle(old.path, str(tmp_path / "new"), seed=3).sites == SITES  # the same again is fine
    with pytest.raises(UserError, match=r"was made with shuffled\.seed = 3, not 4"):
        shuffle(old.path, str(tmp_path / "new"), seed=4)
    with pytest.raises(UserError, match="was made with"):
        shuffle(old.path, old.path, seed=4)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no activations here"):
        shuffle(str(tmp_path / "other"), str(tmp_path / "new"), seed=3)
    make(tmp_path / "int8", [20], dtype="int8")
    with pytest.raises(UserError, match="int8 rows would be rounded a second time"):
        shuffle(str(tmp_path / "int8"), str(tmp_path / "new"), seed=3)
    with pytest.raises(UserError, match="allowed: 1 or more"):
        shuffle(old.path, str(tmp_path / "new"), seed=3, workers=-1)


def test_a_damaged_chunk_is_a_mistake_of_one_line(cluster, old, tmp_path):
    chunk = tmp_path / "old/chunk_1.hdf5"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(Exception, match=r"chunk_1\.hdf5: cut or altered"):
        shuffle(old.path, str(tmp_path / "new"), seed=3)
    assert not (tmp_path / "new/manifest.json").exists()


def test_what_lies_in_its_way_is_left_alone(old, tmp_path):
    theirs = tmp_path / "new/parts/theirs.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UserError, match=r"new/parts: is of no shuffle; choose another --out"):
        shuffle(old.path, str(tmp_path / "new"), seed=3)
    assert theirs.read_text() == "mine"
