"""Sweeps in one process: trials are ordinary runs, judged at rungs, resumed where they stood, failed with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import MagicMock

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import wandb

import xlc_ray as xlc
from tests.runs import small_run_in
from tests.sweeps.make import sweep_in
from xlc_ray import evaluation, files
from xlc_ray.activations.store import Store, open_store
from xlc_ray.cluster.sweep import dry_run, plan, sweep
from xlc_ray.config import UserError
from xlc_ray.config.sweep import load_sweep
from xlc_ray.dictionary.checkpoint import load_dictionary, steps
from xlc_ray.sweeps import local, rank
from xlc_ray.sweeps.board import Board
from xlc_ray.training import Learner, train_alone

GATES = {
    "dictionary.gate": {"choice": [{"kind": "batchtopk", "k": 3, "threshold_start": 3}, {"kind": "topk", "k": 2}]},
    "train.lr": {"choice": [0.01, 0.003]},
}
ASHA = {"grace": 4, "reduction": 2}
LEARNS = {"dictionary.bias_init": "geometric_median"}
"""Of the base: explains something from the first rung on."""
REVERSED = {path: {"choice": axis["choice"][::-1]} for path, axis in GATES.items()}
SHARED = {"space": REVERSED, "asha": ASHA, "search": {"metric": "fvu"}, "changes": LEARNS, "share_activations": True}


@pytest.fixture
def written(tmp_path):
    """written(**sections) → the path of a sweep's file."""

    def write(**sections):
        (tmp_path / "sweep.yaml").write_text(sweep_in(tmp_path, **sections).yaml())
        return str(tmp_path / "sweep.yaml")

    return write


def test_each_trial_is_the_run_that_training_it_alone_gives(written, tmp_path):
    found = sweep(written(space=GATES), local=True)
    frame = found.frame()
    assert list(frame["trial"]) == ["batchtopk,lr=0.01", "batchtopk,lr=0.003", "topk,lr=0.01", "topk,lr=0.003"]
    assert set(frame["state"]) == {"finished"}
    alone = small_run_in(tmp_path)({"train.precision": "float64", "dictionary.gate": {"kind": "topk", "k": 2}})
    train_alone(alone)
    out = frame["out"][2]
    mine, config = load_dictionary(out)
    for name, value in load_dictionary(alone.out)[0].state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
    # What the frame says is what evaluation finds on the same tokens.
    held_out = open_store(files.join(config.source.path, "held_out"))
    measured = evaluation.evaluate(mine, config.override({"evaluate.windows": 0}), held_out)
    assert frame["fvu"][2] == pytest.approx(measured["fvu"], rel=1e-5)
    assert frame["l0"][2] == measured["l0"]


def test_trials_are_measured_in_batches_as_large_as_the_settings_say(written, monkeypatch):
    read, asked = rank.held_out_batches, []
    monkeypatch.setattr(rank, "held_out_batches", lambda *given: asked.append(given[2:]) or read(*given))
    sweep(written(changes={"evaluate.batch_tokens": 100, "evaluate.tokens": 150}), local=True)
    assert set(asked) == {(100, 150)}


def test_rungs_leave_a_checkpoint_and_their_measurements(written, tmp_path):
    found = sweep(written(space=GATES, asha=ASHA, changes=LEARNS), local=True)
    frame = found.frame()
    assert set(frame["state"]) == {"finished", "stopped"}
    for row in frame.itertuples():
        assert steps(row.out)[-1] == row.step
        assert (row.state == "finished") == (row.step == 12)
    told = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert (told["trials"], told["failed"], told["rungs"]) == (4, 0, [4, 8])
    assert told["share_of_full_steps"] == frame["step"].sum() / 48
    assert told["pareto_points"] == len(found.pareto())
    metrics = pq.read_table(tmp_path / "sweep/metrics.parquet").to_pandas()
    last = metrics.dropna(subset="held_out/fvu").groupby("trial")["held_out/fvu"].last()
    pd.testing.assert_series_equal(last, frame.set_index("trial")["fvu"].sort_index(), check_names=False)


def test_a_sweep_that_was_killed_gives_the_frame_of_one_that_was_not(written, tmp_path, monkeypatch):
    path, step = written(space=GATES, asha=ASHA, changes=LEARNS), Learner.train_on
    whole = sweep(path, local=True).frame()
    calls, real = [], local.TrialRank.measure

    def killed(self, task, dictionary):
        calls.append(task.config.out)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, task, dictionary)

    monkeypatch.setattr(local.TrialRank, "measure", killed)
    again = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        sweep(path, {"out": again}, local=True)
    assert set(xlc.Sweep(again).frame()["state"]) >= {"waiting", "running"}
    monkeypatch.undo()
    trained = []
    monkeypatch.setattr(Learner, "train_on", lambda self, *given: trained.append(self.config.out) or step(self, *given))
    resumed = sweep(resume=again, local=True).frame()
    pd.testing.assert_frame_equal(resumed.drop(columns="out"), whole.drop(columns="out"))
    assert calls[0] not in trained, "the first trial had finished"
    assert trained


def test_trials_that_share_give_the_frame_of_trials_alone_from_one_read(written, tmp_path, monkeypatch):
    space = GATES | {"seed": {"choice": [0, 1], "when": {"dictionary.gate.kind": "topk"}}}
    path = written(space=space)
    alone = sweep(path, local=True).frame()
    read, gather = [], Store.gather

    def counted(self, *given):
        read.extend([len(given[1])] * (self.path == str(tmp_path / "store")))
        return gather(self, *given)

    monkeypatch.setattr(Store, "gather", counted)
    shared = sweep(path, {"share_activations": True, "out": str(tmp_path / "shared")}, local=True).frame()
    pd.testing.assert_frame_equal(shared.drop(columns="out"), alone.drop(columns="out"))
    assert sum(read) == 2 * 12 * 40, "a stream a seed"
    for mine, theirs in zip(shared["out"], alone["out"], strict=True):
        assert torch.equal(load_dictionary(mine)[0].groups[1].W_dec, load_dictionary(theirs)[0].groups[1].W_dec)
    read.clear()
    parts = {"share_activations": True, "resources.sharing": 2, "out": str(tmp_path / "parts")}
    sweep(path, parts, local=True)
    assert sum(read) == 3 * 12 * 40, "of the first seed's four, two at a time"


@pytest.mark.parametrize("sharing", [None, 2])
def test_a_killed_sweep_of_one_stream_gives_the_frame_of_one_that_was_not(written, tmp_path, monkeypatch, sharing):
    """By halving, too: trials of a stream come to a rung together, whenever the sweep was killed."""
    path, step = written(**SHARED, resources={"sharing": sharing}), Learner.train_on
    whole = sweep(path, local=True).frame()
    assert sorted(set(whole["state"])) == ["finished", "stopped"]
    done = []

    def killed(self, *given):
        done.append(self.step)
        if len(done) == kill:
            raise KeyboardInterrupt
        return step(self, *given)

    for kill in (7, 11, 17, 24):
        done.clear()
        again = str(tmp_path / f"killed{kill}")
        monkeypatch.setattr(Learner, "train_on", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(path, {"out": again}, local=True)
        monkeypatch.undo()
        frame = sweep(resume=again, local=True).frame()
        pd.testing.assert_frame_equal(frame.drop(columns="out"), whole.drop(columns="out"))


def test_of_trials_that_share_only_the_one_at_fault_fails(written, tmp_path):
    space = {"train.lr": {"choice": [0.01, 1e300, 0.003]}}
    frame = sweep(written(space=space, share_activations=True), local=True).frame()
    assert list(frame["state"]) == ["finished", "failed", "finished"]
    assert "gradient norm" in frame["error"][1]
    mistaken = {"kind": "custom", "path": "tests.sweeps.broken:Broken", "options": {"at": 6, "mistake": True}}
    gates = {"dictionary.gate": {"choice": [{"kind": "relu"}, mistaken]}}
    out = {"out": str(tmp_path / "mistaken")}
    frame = sweep(written(space=gates, share_activations=True, changes={"train.loss": {}}), out, local=True).frame()
    assert list(frame["state"]) == ["finished", "failed"]
    assert frame["error"][1] == "gate: a mistake"


def test_a_trial_that_diverges_is_failed_and_the_others_go_on(written):
    found = sweep(written(space={"train.lr": {"choice": [1e300, 0.01]}}, changes=LEARNS), local=True)
    frame = found.frame()
    assert list(frame["state"]) == ["failed", "finished"]
    assert "gradient norm" in frame["error"][0]
    assert list(found.pareto()["trial"]) == ["lr=0.01"]


def test_a_directory_holds_one_sweep(written, tmp_path):
    path = written()
    sweep(path, local=True, limit=1)
    assert len(sweep(path, {"search.max_concurrent": 1}, local=True).frame()) == 2
    with pytest.raises(UserError, match=r"holds a sweep with other settings \(base\.seed: 0, now 1\)"):
        sweep(path, {"base.seed": 1}, local=True)
    with pytest.raises(UserError, match=r"nowhere: no sweep\.yaml here"):
        sweep(resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="give either --config FILE or --resume DIR"):
        sweep()


@pytest.mark.parametrize("sharing", [False, True])
def test_a_trial_whose_end_was_not_measured_is_measured_when_the_sweep_goes_on(written, tmp_path, sharing):
    path, more = written(), {"share_activations": sharing, "out": str(tmp_path / "again")}
    whole = sweep(path, local=True).frame()
    first, second = plan(path, more, None, None)[1]
    train_alone(first.config)  # as jobs/train.py does
    sweep(path, more, local=True)
    lines = files.read_bytes(f"{second.config.out}/metrics.jsonl").splitlines(keepends=True)
    files.write_bytes(f"{second.config.out}/metrics.jsonl", b"".join(lines[:-1]))  # the disk lost the last one
    files.remove(str(tmp_path / "again/sweep.json"))
    frame = sweep(path, more, local=True).frame()
    pd.testing.assert_frame_equal(frame.drop(columns="out"), whole.drop(columns="out"), rtol=1e-5)


def test_fewer_trials_leave_what_others_have_done(written, monkeypatch):
    path = written(space=GATES, asha=ASHA, changes=LEARNS)
    whole = sweep(path, local=True)
    before = whole.frame()
    monkeypatch.setattr(Learner, "train_on", lambda *_: pytest.fail("all is done"))
    for limit in (1, None):
        pd.testing.assert_frame_equal(sweep(path, local=True, limit=limit).frame(), before)
    assert files.read_json(f"{whole.out}/sweep.json")["trials"] == 4


def test_fewer_trials_than_were_begun_wait_for_more(written, monkeypatch):
    path, step = written(asha={"grace": 4, "rungs": [4, 8], "reduction": 1.01}), Learner.train_on

    def killed(self, *given):
        if self.config.train.lr == 0.003 and self.step == 9:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(Learner, "train_on", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(path, local=True)
    monkeypatch.undo()
    frame = sweep(path, local=True, limit=1).frame()
    assert list(zip(frame["state"], frame["step"], strict=True)) == [("finished", 12), ("waiting", 8)]
    assert list(sweep(path, local=True).frame()["state"]) == ["finished"] * 2


def test_a_sweep_that_was_moved_goes_on_where_it_is(written, tmp_path):
    whole = sweep(written(), local=True, limit=1)
    moved = Path(whole.out).rename(tmp_path / "moved")
    found = sweep(resume=str(moved), local=True)
    assert found.out == str(moved)
    assert list(found.frame()["state"]) == ["finished"] * 2
    assert not Path(whole.out).exists()


def test_a_limit_is_of_one_session_and_keeps_those_that_wait(written, tmp_path):
    path, again = written(), str(tmp_path / "again")
    board = Board(plan(path, {"out": again}, None, None)[0])
    for trial in plan(path, {"out": again}, None, None)[1]:
        board.add(trial)
    board.write()  # as a session that was killed at its start leaves it
    assert list(sweep(path, {"out": again}, local=True, limit=1).frame()["state"]) == ["finished", "waiting"]
    assert load_sweep(f"{again}/sweep.yaml").search.max_trials is None
    assert list(sweep(resume=again, local=True).frame()["state"]) == ["finished"] * 2
    with pytest.raises(UserError, match="--limit: 0 trials; allowed: 1 and more"):
        sweep(path, local=True, limit=0)


def test_a_sweep_goes_on_with_what_a_run_may_go_on_with(written):
    path = written()
    sweep(path, local=True, limit=1)
    changed = {"base.train.log_every": 2, "base.train.keep": 1, "base.source.verify": True}
    assert list(sweep(path, changed, local=True).frame()["state"]) == ["finished"] * 2
    with pytest.raises(UserError, match=r"other settings \(base\.evaluate\.tokens: 65536, now 100\)"):
        sweep(path, changed | {"base.evaluate.tokens": 100}, local=True)


def test_predictions_need_a_whole_dictionary_which_one_process_has(written, monkeypatch):
    monkeypatch.setattr(local.TrialRank, "_predict", lambda *_: {"ce_recovered": 0.5, "kl": 0.1, "top1_agreement": 0.5})
    path = written(search={"metric": "kl"}, changes={"cluster.tensor_parallel": 2})
    assert list(sweep(path, local=True).frame()["kl"]) == [0.1, 0.1]


def test_optuna_proposes_what_was_not_tried_and_goes_on_from_what_was(written, tmp_path):
    space = {
        "dictionary.gate": {"choice": [{"kind": "topk", "k": 2}, {"kind": "relu"}]},
        "dictionary.gate.k": {"randint": [1, 4], "when": {"dictionary.gate.kind": "topk"}},
        "train.lr": {"loguniform": [0.001, 0.1]},
    }
    path = written(space=space, search={"kind": "optuna", "num_samples": 5})
    assert any("6 corners" in line for line in dry_run(path, None, None, None))
    first = sweep(path, local=True, limit=3).frame()
    whole = sweep(path, local=True).frame()
    assert len(first) == 3
    assert list(whole["trial"][:3]) == list(first["trial"])
    assert len(set(whole["trial"])) == 5
    assert whole["fvu"].notna().all()
    pd.testing.assert_frame_equal(sweep(path, local=True, limit=2).frame(), whole)
    used_up = {"train.lr": {"choice": [0.01, 0.02]}}
    path = written(space=used_up, search={"kind": "optuna", "num_samples": 9, "metric": "fvu"}, out=str(tmp_path / "b"))
    assert len(sweep(path, local=True).frame()) == 2


def test_dry_run_names_every_trial_and_starts_nothing(written, tmp_path):
    lines = list(dry_run(written(space=GATES, asha=ASHA), {"override.cluster.replicas": 2}, 3, None))
    assert len(lines) == 4
    assert lines[0].startswith("batchtopk,lr=0.01   2 workers, 1 CPU   ")
    assert lines[-1] == "3 trials, 36 steps if none is cut short, cut at 4, 8; nothing was started"
    assert not (tmp_path / "sweep").exists()


def test_a_store_without_held_out_rows_is_refused(written, tmp_path):
    path = written()
    files.remove(str(tmp_path / "store/held_out"))
    with pytest.raises(UserError, match="has no held-out part"):
        sweep(path, local=True)


def test_a_live_source_needs_a_cluster(written, tmp_path):
    path = written(changes={"source": {"kind": "live", "path": str(tmp_path / "store")}}, share_activations=True)
    with pytest.raises(
        UserError, match=r"--local: with source\.kind: live, actors of a Ray cluster make the activations"
    ):
        sweep(path, local=True)
    assert next(dry_run(path, None, None, None)).startswith("lr=0.01   1 worker and 1 language model, 1.5 CPU   ")


def test_wandb_gets_a_group_a_sweep_and_a_run_a_trial(written, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **given: runs.append(given) or MagicMock())
    path = written(changes={"train.wandb": {"project": "tests"}})
    for out in ("one", "two"):
        sweep(path, {"out": str(tmp_path / out)}, local=True)
    assert [(run["group"], run["name"]) for run in runs] == [
        (group, name) for group in ("one", "two") for name in ("lr=0.01", "lr=0.003")
    ]
    assert len({run["id"] for run in runs}) == 4
    assert all(re.fullmatch(r"\w{1,64}", run["id"]) for run in runs)
