"""Populations: who is replaced by whom, what settings become, and sweeps whose trials go on from others' parameters."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

import xlc_ray as xlc
from tests.config.tree import ROOT
from tests.runs import small_run_in
from tests.sweeps.make import sweep as sweep_over
from tests.sweeps.make import sweep_in
from xlc_ray import files
from xlc_ray.cluster.sweep import dry_run, sweep
from xlc_ray.config import UserError, load_config, load_config_text
from xlc_ray.config.sweep import Axis, Pbt
from xlc_ray.dictionary import checkpoint
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.sweeps import generations, local
from xlc_ray.sweeps.board import Row
from xlc_ray.sweeps.frontier import scores
from xlc_ray.sweeps.pbt import Population, explore, near, replaced, stops
from xlc_ray.training import Learner, logs, train_alone

BASE = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")
NAMES = [f"t{i}" for i in range(8)]
RATES = {"train.lr": {"choice": [1e-5, 1e-2, 3e-3, 1e-3]}}
FVU = {"metric": "fvu"}


def population(metric="fvu", number=2, names=NAMES, seed=0):
    return Population(names, number, metric, seed, lambda changes, rng: {**changes, "drawn": int(rng.integers(1000))})


def decide(found, step=10, **options):
    measured = {name: {"fvu": v} if isinstance(v, float | int) else v for name, v in found.items()}
    return population(**options).decide(step, measured, {name: {"of": name} for name in found})


# ---------------------------------------------------------------- who


def test_the_worst_go_on_from_the_best():
    found = dict(zip(NAMES, (5, 1, 4, 3, 2, 9, 8, 7), strict=True))
    moves = decide(found)
    assert set(moves) == {"t5", "t6"}
    assert {move.source for step in range(40) for move in decide(found, step).values()} == {"t1", "t4"}
    assert all(move.changes["of"] == move.source for move in moves.values())


def test_a_decision_depends_on_what_was_measured_and_the_seed_alone():
    found = dict(zip(NAMES, (5, 1, 4, 3, 2, 9, 8, 7), strict=True))
    whole = [decide(found, step) for step in range(20)]
    assert [decide(dict(reversed(found.items())), step) for step in range(20)] == whole, "whoever came first"
    assert [decide(found, step, seed=1) for step in range(20)] != whole
    assert [decide(found, step) for step in reversed(range(20))] == whole[::-1], "whatever was decided before"


def test_equals_are_not_replaced():
    assert decide(dict.fromkeys(NAMES, 1.0)) == {}
    assert set(decide(dict.fromkeys(NAMES, 1.0) | {"t3": 2.0})) == {"t3"}
    ties = dict.fromkeys(NAMES, 1.0) | {"t6": 2.0, "t7": 2.0}
    assert {m.source for step in range(60) for m in decide(ties, step).values()} == set(NAMES[:6]), "all of the best"


def test_no_trial_of_the_frontier_is_replaced_and_all_of_it_is_best():
    curve = {8: 0.4, 16: 0.3, 32: 0.2, 64: 0.15, 128: 0.1}
    found = {f"t{i}": {"l0": l0, "fvu": fvu} for i, (l0, fvu) in enumerate(curve.items())}
    behind = {"t5": {"l0": 10, "fvu": 0.6}, "t6": {"l0": 100, "fvu": 0.3}, "t7": {"l0": 35, "fvu": 0.21}}
    assert decide(found, metric="frontier", number=2) == {}
    moves = [decide(found | behind, step, metric="frontier", number=2) for step in range(60)]
    worst = sorted(behind, key=scores("frontier", found | behind).__getitem__)[1:]
    assert all(set(move) == set(worst) for move in moves)
    assert {m.source for move in moves for m in move.values()} == set(found)


def test_whoever_diverged_is_replaced_while_any_other_did_not():
    found = {"t0": {}, "t1": {}, "t2": {}, "t3": 3.0, "t4": {"fvu": math.nan}}
    assert {name: move.source for name, move in decide(found).items()} == dict.fromkeys(["t0", "t1", "t2", "t4"], "t3")
    assert decide({"t0": {}, "t1": {}}) == {}
    assert decide({"t0": 1.0}) == {}
    assert set(decide({"t0": 1.0, "t1": 2.0})) == {"t1"}, "of a population that others have left, half at most"


def test_a_population_must_be_large_enough_for_its_quantile():
    assert [replaced(q, n) for q, n in ((0.25, 4), (0.25, 7), (0.5, 2), (0.1, 30), (0.2, 5))] == [1, 1, 1, 3, 1]
    with pytest.raises(UserError, match=r"0\.25 of 3 trials is nobody; use at least 4 trials, or a quantile of 0\.33"):
        replaced(0.25, 3)
    with pytest.raises(UserError, match=r"pbt\.quantile: 0\.5 of 1 trial is nobody; use at least 2 trials$"):
        replaced(0.5, 1)


def test_comparisons_are_below_the_last_step():
    assert stops(Pbt(interval=5), 20) == (5, 10, 15)
    assert stops(Pbt(interval=5), 22) == (5, 10, 15, 20)
    assert stops(None, 20) == ()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("axis", "value", "wanted"),
    [
        ({"loguniform": [1e-4, 1e-2]}, 1e-3, {8e-4, 1.25e-3}),
        ({"uniform": [0, 1]}, 0.9, {0.72, 1.0}),
        ({"uniform": [0.5, 1]}, 0.55, {0.5, 0.6875}),
        ({"randint": [1, 100]}, 40, {32, 50}),
        ({"randint": [1, 100]}, 2, {1, 3}),
        ({"choice": [0.4, 0.1, 0.2]}, 0.2, {0.1, 0.4}),
        ({"choice": [0.4, 0.1, 0.2]}, 0.4, {0.2, 0.4}),
        ({"grid": ["a", None, "b"]}, None, {"a", "b"}),
    ],
)
def test_a_setting_becomes_one_beside_it_within_its_range(axis, value, wanted):
    rng = np.random.default_rng(0)
    assert {near(Axis(**axis), value, 1.25, rng) for _ in range(40)} == wanted


def test_explored_points_stay_in_the_space_and_are_drawn_anew_at_times():
    axes = {
        "train.lr": {"loguniform": [1e-4, 1e-1]},
        "train.loss.auxk": {"choice": [None, {}]},
        "train.loss.auxk.coefficient": {"uniform": [0.01, 0.1], "when": {"train.loss.auxk.k": [None]}},
    }
    one = sweep_over(BASE, space=axes, search={"kind": "random", "num_samples": 4}, pbt={"interval": 10})
    old = {"train.lr": 1e-3, "train.loss.auxk": {}, "train.loss.auxk.coefficient": 0.05}
    rng = np.random.default_rng(0)
    found = [explore(one, one.pbt, old, rng)["train.lr"] for _ in range(2000)]
    assert all(1e-4 <= lr <= 1e-1 for lr in found)
    assert sum(lr in (8e-4, 1.25e-3) for lr in found) / 2000 == pytest.approx(0.75, abs=0.03)
    assert explore(one, one.pbt, old, np.random.default_rng(5)) == explore(one, one.pbt, old, np.random.default_rng(5))


# ---------------------------------------------------------------- sweeps


@pytest.fixture
def written(tmp_path):
    """written(**sections) → the path of a sweep's file: four learning rates, the first of them hopeless."""

    def write(**sections):
        sections = {"space": RATES, "search": FVU, "pbt": {"interval": 4}} | sections
        (tmp_path / "sweep.yaml").write_text(sweep_in(tmp_path, **sections).yaml())
        return str(tmp_path / "sweep.yaml")

    return write


def parameters(out, step=None):
    return {name: value.clone() for name, value in load_dictionary(out, step)[0].state_dict().items()}


def test_a_hopeless_trial_goes_on_from_a_better_one_with_settings_beside_its_own(written, tmp_path, monkeypatch):
    begun, adopt = {}, checkpoint.adopt

    def told(run_dir, source, step):
        adopt(run_dir, source, step)
        begun[files.name(run_dir), step] = (
            parameters(run_dir),
            parameters(source, step),
            checkpoint.facts(run_dir, step),
        )

    monkeypatch.setattr(checkpoint, "adopt", told)
    found = sweep(written(), local=True)
    rows = {row.trial: row for row in found.rows()}
    hopeless = rows["member_0"]
    assert [told["step"] for told in hopeless.history] == [0, 4]
    assert hopeless.history[0] == {"step": 0, "from": None, "settings": {"train.lr": 1e-5}}
    source, lr = hopeless.history[1]["from"], hopeless.settings["train.lr"]
    assert source == "member_1", "the best"
    assert lr in RATES["train.lr"]["choice"]
    mine, theirs, facts = begun["member_0", 4]
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (facts["adopted_from"], facts["step"]) == ("member_1", 4)
    # From there on it is a run of these settings, as training it alone from that checkpoint gives.
    alone = small_run_in(tmp_path)({"train.precision": "float64", "train.lr": RATES["train.lr"]["choice"][1]})
    first = alone.override({"out": str(tmp_path / "first")})
    with pytest.raises(RuntimeError, match="enough"):
        train_alone(first, lambda metrics: enough(metrics, 5))
    other = alone.override({"out": str(tmp_path / "other"), "train.lr": lr})
    generations.take_over(other, first.out, 4)
    train_alone(other)
    theirs = parameters(other.out)
    assert all(torch.equal(value, theirs[name]) for name, value in parameters(f"{found.out}/trials/member_0").items())


def test_the_past_of_a_trial_names_the_settings_of_every_step(tmp_path):
    def row(name, step, *history):
        told = [{"step": at, "from": source, "settings": {"train.lr": lr}} for at, source, lr in history]
        return Row(name, "waiting", step, 12, told[-1]["settings"], history=told)

    rows = [
        row("a", 12, (0, None, 1.0), (4, "b", 2.0), (8, "c", 3.0)),
        row("b", 12, (0, None, 4.0), (8, "c", 5.0)),
        row("c", 12, (0, None, 6.0), (4, "b", 7.0)),
        row("d", 8, (0, None, 8.0), (8, "c", 9.0)),
    ]
    files.write_json(f"{tmp_path}/sweep.json", {"rows": [asdict(one) for one in rows]})
    found = xlc.Sweep(str(tmp_path))
    assert found.lineage("a").values.tolist() == [[0, 4, "b", 4.0], [4, 8, "c", 7.0], [8, 12, "a", 3.0]]
    assert found.lineage("d").values.tolist() == [[0, 4, "b", 4.0], [4, 8, "c", 7.0]], "replaced a moment ago"
    with pytest.raises(UserError, match=r"e: no such trial; allowed: a, b, c, d"):
        found.lineage("e")


def enough(metrics, step):
    if metrics["step"] >= step:
        raise RuntimeError("enough")


def test_a_run_directory_says_what_runs_now_and_what_it_measured(written):
    found = sweep(written(), local=True)
    for row in found.rows():
        out = f"{found.out}/{row.out}"
        config = load_config_text(files.read_bytes(f"{out}/config.yaml"), out)
        assert config.train.lr == row.settings["train.lr"] == row.history[-1]["settings"]["train.lr"]
        lines = logs.read(out)
        assert [line["step"] for line in lines if "held_out/fvu" in line] == [4, 8, 12]
        assert lines[-1]["held_out/fvu"] == row.metrics["fvu"]
        began = max(told["step"] for told in row.history)
        assert min(checkpoint.steps(out)) >= began, "no parameters of before"
    frame = found.frame()
    assert set(frame["state"]) == {"finished"}
    assert set(frame["step"]) == {12}
    moved = sum(len(row.history) - 1 for row in found.rows())
    assert files.read_json(f"{found.out}/sweep.json")["replaced"] == moved >= 2
    page = files.read_bytes(f"{found.out}/report.html").decode()
    assert "at step 4 from member_1, before: train.lr = 1e-05" in page
    assert f"{moved} times replaced" in page


def test_a_killed_population_gives_the_frame_of_one_that_was_not(written, tmp_path, monkeypatch):
    """Killed in a step, where a trial is measured, between copies, and before the line that makes them count."""
    path = written(pbt={"interval": 6, "quantile": 0.5})
    whole = sweep(path, local=True)
    kinds = {
        "step": (Learner, "train_on", 30),
        "stop": (local.TrialRank, "measure", 3),
        "copy": (checkpoint, "adopt", 2),
        "line": (generations.Board, "next_generation", 1),
    }
    for kind, (owner, name, number) in kinds.items():
        calls, real = [], getattr(owner, name)

        def killed(*given, calls=calls, real=real, number=number):
            calls.append(given)
            if len(calls) == number:
                raise KeyboardInterrupt
            return real(*given)

        again = str(tmp_path / kind)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                sweep(path, {"out": again}, local=True)
        same(sweep(resume=again, local=True), whole)


@pytest.mark.slow
def test_a_population_goes_on_after_its_process_was_killed(written, tmp_path):
    path = written(pbt={"interval": 20}, changes={"train.steps": 80, "train.checkpoint_every": 20})
    whole, again = sweep(path, local=True), tmp_path / "killed"
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), "--local"]
    log = tmp_path / "log"
    with log.open("w") as output:
        running = subprocess.Popen([*command, "--config", path, f"--out={again}"], stdout=output, stderr=output)
    while not generation(again):
        assert running.poll() is None, log.read_text()
        time.sleep(0.001)
    running.kill()
    running.wait()
    assert set(xlc.Sweep(str(again)).frame()["state"]) != {"finished"}
    done = subprocess.run([*command, "--resume", str(again)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    same(xlc.Sweep(str(again)), whole)


def generation(out):
    file = out / "sweep.json"
    return file.exists() and json.loads(file.read_text()).get("replaced")


def same(got, want):
    pd.testing.assert_frame_equal(got.frame().drop(columns="out"), want.frame().drop(columns="out"))
    assert [row.history for row in got.rows()] == [row.history for row in want.rows()]
    for mine, theirs in zip(got.rows(), want.rows(), strict=True):
        a, b = parameters(f"{got.out}/{mine.out}"), parameters(f"{want.out}/{theirs.out}")
        assert all(torch.equal(a[name], b[name]) for name in b), mine.trial


def test_a_population_of_one_stream_is_that_of_trials_alone(written, tmp_path):
    path = written()
    alone = sweep(path, local=True)
    same(sweep(path, {"out": str(tmp_path / "shared"), "share_activations": True}, local=True), alone)
    parts = {"out": str(tmp_path / "parts"), "share_activations": True, "resources.sharing": 3}
    same(sweep(path, parts, local=True), alone)


def test_a_trial_that_diverges_is_replaced_and_at_the_end_has_failed(written):
    found = sweep(written(space={"train.lr": {"choice": [1e300, 1e-2, 3e-3, 1e-3]}}), local=True)
    rows = found.rows()
    assert "gradient norm" in rows[0].history[1]["error"]
    assert rows[0].history[1]["from"] == "member_1"
    assert [row.state for row in rows[1:]] == ["finished"] * 3
    again = written(space={"train.lr": {"choice": [1e300, 1e301]}}, pbt={"interval": 4, "quantile": 0.5}, out="x")
    frame = sweep(again, {"out": found.out + "2"}, local=True).frame()
    assert list(frame["state"]) == ["failed", "failed"]
    assert all("gradient norm" in error for error in frame["error"])


def test_a_trial_that_fails_for_another_reason_leaves_the_population(written, monkeypatch):
    path, real = written(), local.loop.prepare
    monkeypatch.setattr(local.loop, "prepare", lambda config: refuse(config) or real(config))
    frame = sweep(path, local=True).frame()
    assert list(frame["state"]) == ["finished", "finished", "finished", "failed"]
    monkeypatch.undo()
    resumed = sweep(path, local=True).frame()
    assert list(resumed["state"]) == list(frame["state"]), "the others went on without it"


def test_what_failed_is_tried_again_while_its_generation_is_not_over(written, tmp_path, monkeypatch):
    path = written()
    whole = sweep(path, local=True)
    real, asked = local.loop.prepare, []

    def troubled(config):
        asked.append(files.name(config.out))
        if asked[4:] == ["member_0"]:
            raise UserError("not now")
        if len(asked) == 7:
            raise KeyboardInterrupt
        return real(config)

    monkeypatch.setattr(local.loop, "prepare", troubled)
    again = str(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        sweep(path, {"out": again}, local=True)
    assert [row.state for row in xlc.Sweep(again).rows()] == ["failed", "paused", "running", "waiting"]
    monkeypatch.undo()
    same(sweep(resume=again, local=True), whole)


def refuse(config):
    if config.out.endswith("member_3") and checkpoint.steps(config.out):
        raise UserError("no more")


def test_a_population_keeps_its_size_and_says_what_it_will_do(written):
    path = written(search={"kind": "random", "num_samples": 4} | FVU, space={"train.lr": {"loguniform": [1e-3, 1e-2]}})
    lines = list(dry_run(path, None, None, None))
    assert lines[0].startswith("member_0   1 worker, 0.5 CPU   train.lr=0.00")
    assert lines[-1] == "4 trials, 48 steps, up to 1 of them replaced at 4, 8; nothing was started"
    with pytest.raises(UserError, match=r"pbt\.quantile: 0\.25 of 3 trials is nobody"):
        list(dry_run(path, None, 3, None))
    sweep(path, local=True)
    with pytest.raises(UserError, match=r"holds a sweep with other settings \(search\.num_samples: 4, now 5\)"):
        sweep(path, {"search.num_samples": 5}, local=True)
