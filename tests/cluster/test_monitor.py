"""The table of runs without a cluster: what a directory says of a run, its driver, and its logs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cluster.conftest import ROOT
from tests.runs import small_run_in
from xlc_ray.cluster import control, driver, monitor, runs
from xlc_ray.cluster.driver import Driver
from xlc_ray.config import UserError
from xlc_ray.training import logs, train_alone
from xlc_ray.training.saving import asked_to_stop

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """runs/done, a whole run; runs/half, one that lost its last lines; runs/sweep with two trials."""
    folder = tmp_path_factory.mktemp("shelf")
    config = small_run_in(folder)({"train.log_every": 1})
    for name in ("done", "half", "sweep/trials/lr=0.01", "sweep/trials/lr=0.02"):
        train_alone(config.override({"out": str(folder / "runs" / name)}))
    for name in ("half", "sweep/trials/lr=0.02"):
        path = folder / "runs" / name / logs.FILE
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    return folder / "runs"


@contextmanager
def process():
    """A living process, and what driver.json would say of it."""
    child = subprocess.Popen(["sleep", "100"])
    driven = Driver(
        host=driver.socket.gethostname(),
        pid=child.pid,
        born=driver._born(child.pid) or "",
        started=time.time(),
        command="jobs/train.py",
        job="01000000",
        dashboard=NOWHERE,
        logs="/nowhere",
        output=None,
    )
    try:
        yield child, driven
    finally:
        child.kill()
        child.wait()


def state(path, driven=None):
    """The state of a run with this in driver.json."""
    file = path / driver.FILE
    if driven is not None:
        file.write_text(driven.model_dump_json())
    (run,) = runs.find(str(path))
    file.unlink(missing_ok=True)
    return run.state


def test_table_shows_runs_and_indents_the_trials_of_a_sweep(shelf):
    header, *rows = monitor.table(runs.find(str(shelf)))
    assert header.split() == ["run", "state", "step", "loss", "ev", "l0", "dead", "tok/s", "left", "age"]
    last = logs.read(str(shelf / "done"))[-1]
    assert rows[0].split()[:6] == [
        *("done", "finished", "12/12", f"{last['loss']:.4g}"),
        *(f"{last['explained_variance']:.3f}", f"{last['l0']:.1f}"),
    ]
    assert [row.split()[0] for row in rows] == ["done", "half", "sweep", "lr=0.01", "lr=0.02"]
    assert [row.startswith("  ") for row in rows] == [False, False, False, True, True]
    assert [row.split()[1] for row in rows[2:]] == ["running", "finished", "running"]
    assert rows[2].split()[2:4] == ["1/2", "trials"]
    assert len({len(row) for row in rows if "trials" not in row}) == 1  # columns stand in line


def test_a_sweep_says_which_of_its_trials_are_over_and_why(shelf):
    board = shelf / "sweep" / runs.BOARD
    rows = [("lr=0.01", "finished", None), ("lr=0.02", "failed", "Diverged: step 5"), ("lr=0.04", "waiting", None)]
    keys = ("trial", "state", "error")
    board.write_text(json.dumps({"rows": [dict(zip(keys, row, strict=True)) for row in rows]}))
    found = runs.find(str(shelf / "sweep"))
    board.unlink()
    assert [(run.state, run.done) for run in found[1:]] == [("finished", "12/12"), ("failed", "5/12")]
    assert found[0].done == "2/3 trials"
    assert monitor.table(found)[-1] == "sweep/lr=0.02: Diverged: step 5"


def test_a_run_that_nobody_says_to_drive_is_stopped_once_it_is_quiet(shelf):
    assert state(shelf / "half") == "running"
    os.utime(shelf / "half" / logs.FILE, (0, time.time() - 600))
    assert state(shelf / "half") == "stopped"
    os.utime(shelf / "half" / logs.FILE)


def test_state_follows_the_driver(shelf):
    half, metrics = shelf / "half", shelf / "half" / logs.FILE
    with process() as (child, driven):
        old = driven.model_copy(update={"started": time.time() - 600})
        assert state(half, driven) == "running"
        os.utime(metrics, (0, time.time() - 600))
        assert state(half, driven) == "running"  # it has only just begun
        assert state(half, old) == "stalled"
        other = old.model_copy(update={"host": "elsewhere"})
        assert state(half, other) == "stalled"
        os.utime(metrics)
        assert state(half, other) == "running"
        assert state(half, driven.model_copy(update={"born": "1"})) == "failed"  # another process has its number now
        child.kill()
        child.wait()
        assert state(half, driven) == "failed"
        for outcome in ("interrupted", "failed", "finished"):
            assert state(half, driven.model_copy(update={"outcome": outcome})) == outcome


def test_a_slow_run_may_be_quiet_for_longer(shelf, tmp_path):
    config = (shelf / "half/config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("log_every: 1", "log_every: 50"))
    last = logs.last(str(shelf / "half"))
    with process() as (_, driven):
        old = driven.model_copy(update={"started": 0.0})
        for rate, expected in ((400.0, "stalled"), (4.0, "running")):  # five lines take 25 and 2,500 seconds
            (tmp_path / logs.FILE).write_text(json.dumps(last | {"tokens_per_s": rate}) + "\n")
            os.utime(tmp_path / logs.FILE, (0, time.time() - 600))
            assert state(tmp_path, old) == expected


def test_time_left_is_steps_left_at_the_speed_of_the_last_line(shelf, tmp_path):
    (tmp_path / "config.yaml").write_text((shelf / "half/config.yaml").read_text())
    line = logs.last(str(shelf / "half")) | {"step": 2, "tokens_per_s": 0.4}
    (tmp_path / logs.FILE).write_text(json.dumps(line) + "\n")
    (run,) = runs.find(str(tmp_path))
    assert run.left == pytest.approx(10 * 40 / 0.4, abs=5)


def test_newest_line_is_the_last_whole_one_whatever_its_length(shelf, tmp_path, monkeypatch):
    lines = logs.read(str(shelf / "done"))
    assert logs.last(str(shelf / "done")) == lines[-1]
    whole = (shelf / "done" / logs.FILE).read_text()
    (tmp_path / logs.FILE).write_text(whole + '{"step": 13, "lo')
    assert logs.last(str(tmp_path)) == lines[-1]
    (tmp_path / logs.FILE).write_text('{"step": 1')
    assert logs.last(str(tmp_path)) is None
    assert logs.last(str(tmp_path / "nowhere")) is None


def test_names_that_are_not_there_and_runs_that_are_over_are_one_line(shelf):
    found = runs.find(str(shelf))
    assert runs.pick(found, "sweep/lr=0.01").path == str(shelf / "sweep/trials/lr=0.01")
    with pytest.raises(UserError, match=r"dome: no such run; did you mean done\?"):
        runs.pick(found, "dome")
    with pytest.raises(UserError, match="done: nobody to stop: it is finished"):
        control.stop(runs.pick(found, "done"))
    with pytest.raises(UserError, match=r"done: has no driver\.json"):
        list(control.log_lines(runs.pick(found, "done"), lambda: False))


def test_what_runs_elsewhere_names_its_host(shelf):
    with process() as (_, driven):
        file = shelf / "half" / driver.FILE
        file.write_text(driven.model_copy(update={"host": "elsewhere", "logs": "/ray/logs"}).model_dump_json())
        run = runs.pick(runs.find(str(shelf)), "half")
        file.unlink()
        with pytest.raises(UserError, match=rf"process {driven.pid} of elsewhere; stop it there"):
            control.stop(run)
        with pytest.raises(UserError, match="on elsewhere, in /ray/logs"):
            list(control.log_lines(run, lambda: False))


def test_logs_follow_the_driver_and_the_workers_of_its_job_alone(shelf, tmp_path):
    ours, theirs = tmp_path / "worker-a-01000000-7.err", tmp_path / "worker-b-02000000-8.err"
    output = tmp_path / "train.log"
    output.write_text("train 1/12\n")
    theirs.write_text("of another job\n")
    ours.write_text(":job_id:01000000\n:actor_name:RayTrainWorker\nhalf a li")

    def more():
        with ours.open("a") as file:
            file.write("ne\nsecond\n")
        return False

    rounds = iter([lambda: True, more])
    with process() as (_, driven):
        own = driven.model_copy(update={"logs": str(tmp_path), "output": str(output)})
        (run,) = [r for r in runs.find(str(shelf)) if r.name == "half"]
        lines = list(control.log_lines(dataclasses.replace(run, driver=own), lambda: next(rounds)()))
    assert lines == [f"==> {output} <==", "train 1/12", f"==> {ours} <==", "half a line", "second"]


def test_a_trial_is_asked_to_stop_and_its_logs_are_what_workers_said_while_they_worked_on_it(shelf, tmp_path):
    worker = tmp_path / "worker-a-01000000-7.err"
    worker.write_text("starting\ntrials: lr=0.01 lr=0.02\nboth\ntrials: lr=0.01\nthe first\ntrials: lr=0.02\nslow\n")
    (tmp_path / "sweep.log").write_text("lr=0.02 running\n")
    with process() as (_, driven):
        own = driven.model_copy(update={"logs": str(tmp_path), "output": str(tmp_path / "sweep.log")})
        (shelf / "sweep" / driver.FILE).write_text(own.model_dump_json())
        run = runs.pick(runs.find(str(shelf)), "sweep/lr=0.02")
        assert list(control.log_lines(run, lambda: False)) == [f"==> {worker} <==", "both", "slow"]
        assert "ends at its next checkpoint" in control.stop(run)
        (shelf / "sweep" / driver.FILE).unlink()
    assert asked_to_stop(run.path)
    assert not asked_to_stop(run.path), "once"
    with pytest.raises(UserError, match=r"sweep/lr=0\.01: nobody to stop: it is finished"):
        control.stop(runs.pick(runs.find(str(shelf)), "sweep/lr=0.01"))


def test_whoever_else_answers_where_a_dashboard_would_is_none(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert control.client(url) is None
        with pytest.raises(UserError, match=f"no cluster answers at {url}"):
            monitor.report(str(tmp_path), url)
        server.shutdown()


def test_a_directory_that_another_process_works_on_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(driver.ray, "init", None)
    with process() as (child, driven):
        (tmp_path / driver.FILE).write_text(driven.model_dump_json())
        with (
            pytest.raises(UserError, match=rf"process {child.pid} is working on it \(jobs/train\.py\)"),
            driver.driving(str(tmp_path)),
        ):
            pass
        assert driver.read(str(tmp_path)) == driven


def test_the_job_prints_the_table_without_a_cluster(shelf):
    done = subprocess.run(
        [sys.executable, "jobs/monitor.py", str(shelf), "--address", NOWHERE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, f"error: --address: no cluster answers at {NOWHERE}\n")
