"""Checkpoints of one process: bit for bit there and back, complete or not there at all, pruned."""

import subprocess
import sys

import pytest
import torch

from tests.equivalence import cases
from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards, checkpoint, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Learner

WIRES = wiring.transcoders([0, 1], 6, skip=True)
GATES = {
    "jumprelu": ({"kind": "jumprelu"}, cases.TANH),
    "batchtopk": ({"kind": "batchtopk", "k": 3, "threshold_start": 2}, cases.AUXK),
}


def learner(gate: str, seed: int = 3, **changes) -> Learner:
    settings = cases.config(*GATES[gate], **changes)
    d = build(settings.dictionary, WIRES, seed, Shards())
    d.read_mean.copy_(torch.arange(12.0) / 10 + seed)
    d.write_scale.copy_(torch.arange(12.0) / 10 + seed)
    return Learner(d, settings)


def trained(gate: str, steps: int, run_dir: str | None = None, **changes) -> Learner:
    made = learner(gate, **changes)
    for batch in cases.batches(WIRES)[:steps]:
        made.train_step(batch, measure=False)
        if run_dir:
            made.save(run_dir)
    return made


def snapshot(made: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state().items()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, gate, place):
    run_dir = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}_{gate}"
    before = trained(gate, 5)
    before.save(run_dir)
    after = learner(gate, seed=9)
    after.resume(run_dir, 5)
    assert after.step == 5
    assert after.dead_totals == before.dead_totals
    for name, value in snapshot(before).items():
        assert torch.equal(after.state()[name], value), name
    for batch in cases.batches(WIRES)[5:9]:
        one, two = before.train_step(batch, measure=True), after.train_step(batch, measure=True)
        assert one == two
    for name, value in snapshot(before).items():
        assert torch.equal(after.state()[name], value), name


def test_a_checkpoint_holds_everything_that_training_changes(tmp_path):
    made = trained("batchtopk", 5)
    made.save(str(tmp_path))
    names = set(made.state())
    for name in made.dictionary.state_dict():
        assert f"dictionary.{name}" in names
    for name in made.parameters:
        assert {f"optimizer.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert {"silent_tokens.0", "silent_tokens.1"} <= names
    assert checkpoint.facts(str(tmp_path), 5)["tokens"] == 5 * cases.ROWS


def test_incomplete_checkpoints_do_not_exist_and_are_replaced(tmp_path):
    made, run_dir = trained("jumprelu", 1), str(tmp_path)
    assert checkpoint.steps(run_dir) == []
    made.save(run_dir)
    (tmp_path / "checkpoints" / "step_2").mkdir()
    (tmp_path / "checkpoints" / "step_2" / "torn.distcp").write_text("half")
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert checkpoint.steps(run_dir) == [1]
    made.train_step(cases.batches(WIRES)[1], measure=False)
    made.save(run_dir)
    assert checkpoint.steps(run_dir) == [1, 2]
    assert not (tmp_path / "checkpoints" / "step_2" / "torn.distcp").exists()
    files.remove(files.join(run_dir, "checkpoints", "step_2", checkpoint.MARKER))
    assert checkpoint.steps(run_dir) == [1]


def test_only_the_newest_are_kept(tmp_path):
    trained("jumprelu", 11, str(tmp_path), **{"train.keep": 3})
    assert checkpoint.steps(str(tmp_path)) == [9, 10, 11]  # by number, not by name
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_load_dictionary_is_the_trained_one_in_inference_form(tmp_path, gate, precision):
    made = trained(gate, 6, str(tmp_path), **{"train.precision": precision})
    files.write_bytes(str(tmp_path / "config.yaml"), made.config.yaml().encode())
    loaded, config = checkpoint.load_dictionary(str(tmp_path))
    assert config == checkpoint.settings(str(tmp_path)) == made.config
    assert not loaded.training
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32}
    assert dict(loaded.wiring.widths) == dict(WIRES.widths)
    assert loaded.wiring == WIRES
    for name, value in made.dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name
    batch = {site: v.float() for site, v in cases.batches(WIRES)[7].items()}
    want = made.dictionary.float().eval().reconstruct(batch)
    for site, value in loaded.reconstruct(batch).items():
        assert torch.equal(value, want[site])


def test_an_older_checkpoint_is_loaded_by_its_step(tmp_path):
    made = trained("jumprelu", 3, str(tmp_path), **{"train.keep": 2})
    files.write_bytes(str(tmp_path / "config.yaml"), made.config.yaml().encode())
    older = checkpoint.load_dictionary(str(tmp_path), 2)[0].b_dec
    assert torch.equal(older, trained("jumprelu", 2).dictionary.b_dec.float())
    assert not torch.equal(older, checkpoint.load_dictionary(str(tmp_path))[0].b_dec)
    with pytest.raises(UserError, match="no complete checkpoint of step 1; there are: 2, 3"):
        checkpoint.load_dictionary(str(tmp_path), 1)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_run_that_adopts_a_checkpoint_has_that_one_alone_and_says_whose_it_was(tmp_path, place):
    base = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}"
    mine, theirs = files.join(base, "mine"), files.join(base, "theirs")
    trained("batchtopk", 4, mine)
    other = trained("batchtopk", 3, theirs, **{"train.lr": 0.5})
    before = snapshot(other)
    checkpoint.adopt(mine, theirs, 3)
    assert checkpoint.steps(mine) == [3]
    assert checkpoint.facts(mine, 3) == checkpoint.facts(theirs, 3) | {"adopted_from": "theirs"}
    files.remove(theirs)
    after = learner("batchtopk", seed=9)
    after.resume(mine, 3)
    assert all(torch.equal(after.state()[name], value) for name, value in before.items())


def test_a_run_without_checkpoints_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no complete checkpoint"):
        checkpoint.load_dictionary(str(tmp_path))


def test_a_wiring_survives_its_description():
    for wires in cases.WIRINGS.values():
        assert checkpoint.wiring_from(checkpoint.describe(wires)) == wires


@pytest.mark.parametrize("harm", ["cut", "gone"])
@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, place, harm):
    run_dir = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}_{harm}"
    made = trained("jumprelu", 3, run_dir, **{"train.keep": 2})
    files.write_bytes(files.join(run_dir, "config.yaml"), made.config.yaml().encode())
    assert (checkpoint.steps(run_dir), checkpoint.damaged(run_dir)) == ([2, 3], [])
    file = files.join(run_dir, "checkpoints", "step_3", "__0_0.distcp")
    whole = files.read_bytes(file)
    if harm == "cut":
        files.write_bytes(file, whole[:-7])
    else:
        files.remove(file)
    there = len(whole) - 7 if harm == "cut" else 0
    assert checkpoint.steps(run_dir) == [2]
    (said,) = checkpoint.damaged(run_dir)
    assert said.endswith(f"step_3: damaged, passed over: __0_0.distcp has {there:,} of {len(whole):,} bytes")
    older = checkpoint.load_dictionary(run_dir)[0].b_dec
    assert torch.equal(older, trained("jumprelu", 2).dictionary.b_dec.float())
    made.save(run_dir)
    assert (checkpoint.steps(run_dir), checkpoint.damaged(run_dir)) == ([2, 3], [])


def test_a_checkpoint_of_which_a_rank_wrote_its_share_elsewhere_is_none(tmp_path, monkeypatch):
    real = checkpoint.dcp.save

    def elsewhere(*args, **kwargs):
        real(*args, **kwargs)
        files.remove(f"{tmp_path}/checkpoints/step_1/__0_0.distcp")

    monkeypatch.setattr(checkpoint.dcp, "save", elsewhere)
    with pytest.raises(UserError, match=r"step_1: __0_0\.distcp is not there: a rank wrote it elsewhere"):
        trained("jumprelu", 1).save(str(tmp_path))
    assert checkpoint.steps(str(tmp_path)) == []


STALE = """
import sys
import torch.distributed as dist
from xlc_ray.dictionary import Shards, checkpoint

rank, meeting, run_dir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
if rank == 1:  # its file system still lists what was there before
    checkpoint.steps = lambda run_dir: [1]
print(checkpoint.newest(run_dir, Shards.of_world(2, "cpu")))
dist.destroy_process_group()
"""


def test_ranks_go_on_from_the_same_checkpoint_where_one_has_an_older_list(tmp_path):
    trained("jumprelu", 2, str(tmp_path))
    command = [sys.executable, "-c", STALE]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet"), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["2\n", "2\n"]


@pytest.mark.parametrize("marker", ["", "[]", '{"step": 3'])
def test_a_marker_that_cannot_be_read_is_damage_and_loading_warns_of_it(tmp_path, marker):
    made = trained("jumprelu", 3, str(tmp_path), **{"train.keep": 2})
    with pytest.raises(UserError, match=r"config\.yaml: missing"):
        checkpoint.settings(str(tmp_path))
    files.write_bytes(str(tmp_path / "config.yaml"), made.config.yaml().encode())
    (tmp_path / "checkpoints/step_3" / checkpoint.MARKER).write_text(marker)
    assert checkpoint.steps(str(tmp_path)) == [2]
    with pytest.warns(UserWarning, match=r"step_3: damaged, passed over: complete\.json: "):
        checkpoint.load_dictionary(str(tmp_path))
