"""jobs/inspect_path.py on a store and on a run: no cluster is started."""

from __future__ import annotations

import pytest

from tests.activations import test_foreign as foreign
from tests.runs import small_run_in
from xlc_ray import files
from xlc_ray.cluster.inspect import inspect
from xlc_ray.config import UserError
from xlc_ray.serving.places import Terms
from xlc_ray.serving.server import running
from xlc_ray.training import train_alone


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of a run of 12 steps that was trained."""
    config = small_run_in(tmp_path_factory.mktemp("run"))()
    train_alone(config)
    return config


def test_a_run_shows_how_far_it_is_and_what_it_read(run):
    files.write_json(files.join(run.out, "eval.json"), {"explained_variance": 0.5, "ce_recovered": None})
    said = list(inspect(run.out))
    assert said[0] == f"{run.out}: step 12 of 12, 480 tokens"
    assert "wiring clt, gate batchtopk (k 3, " in said[2]
    assert said[4].startswith("2 groups, ")
    assert said[5:7] == [
        "  group 0: mlp_in.0 (6) -> mlp_out.0, mlp_out.1 (12)",
        "  group 1: mlp_in.1 (6) -> mlp_out.1 (6)",
    ]
    assert said[7] == "checkpoints: step_8, step_12"
    assert "4 lines, the last of step 12: loss " in said[8]  # steps 1, 4, 8 and 12
    assert said[9].startswith("evaluated: explained_variance 0.5000, fvu n/a")


def test_options_of_stores_are_refused_for_runs(run):
    for option in ({"verify": True}, {"against": run.out}, {"tokenizer": "gpt2"}):
        with pytest.raises(UserError, match="is a run; --verify, --against and --tokenizer are for stores"):
            list(inspect(run.out, **option))


def test_a_store_without_tokenizer_shows_ids_and_says_so(run):
    said = "\n".join(inspect(run.source.path, rows=50, shown=1))
    assert "203 rows of 4 sites in 3 chunks" in said
    assert "tokens as ids; --tokenizer NAME" in said


def test_verify_finds_an_altered_byte_of_the_held_out_part(tmp_path):
    small_run_in(tmp_path)  # makes a store
    small_run_in(tmp_path / "other")
    (tmp_path / "other/store").rename(tmp_path / "store/held_out")
    assert "verified: all 6 chunks are as their checksums say" in list(
        inspect(str(tmp_path / "store"), verify=True, shown=0)
    )
    chunk = tmp_path / "store/held_out/chunk_1.hdf5"
    raw = bytearray(chunk.read_bytes())
    raw[-3] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(UserError, match=r"held_out/chunk_1\.hdf5: altered"):
        list(inspect(str(tmp_path / "store"), verify=True))


@pytest.mark.parametrize("served", [False, True])
def test_verify_reads_the_held_out_part_of_another_programs_store_too(tmp_path, served):
    for path in (tmp_path / "pile", tmp_path / "pile/held_out"):
        path.mkdir()
        foreign.write(path)
        foreign.edit(path / "metadata.json", lambda known: known.update(dtype="bfloat16"))
    with running(str(tmp_path), None, Terms(1 << 26, 1 << 24, 1 << 18), "127.0.0.1", 0) as url:
        path = f"xlc+{url}/pile" if served else str(tmp_path / "pile")
        said = list(inspect(path, verify=True, shown=0))
        assert f"held out: 89 rows in {path}/held_out" in said
        assert "verified: all 6 chunks are readable (they have no checksums)" in said
        (tmp_path / "pile/held_out/chunk_1.hdf5").write_bytes(b"x")
        with pytest.raises(UserError, match=r"held_out"):
            list(inspect(path, verify=True))


def test_a_directory_of_neither_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no activations here"):
        list(inspect(str(tmp_path)))
    with pytest.raises(UserError, match="allowed: 1 or more rows"):
        list(inspect(str(tmp_path), rows=0))
