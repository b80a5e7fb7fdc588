"""What follows one worker group, without any: where Ray Train is not asked."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.train.v2.api.exceptions import WorkerGroupError

from tests.runs import make_store, settings_in
from xlc_ray import files
from xlc_ray.cluster import supervisor, train
from xlc_ray.cluster.placement import Layout, Place
from xlc_ray.config import Config, Unreachable, UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(changes, groups): supervise groups that each do as told; the attempts that were made."""

    def supervise(config: Config, groups: list) -> None:
        files.write_bytes(f"{config.out}/config.yaml", config.yaml().encode())
        left = iter(groups)
        monkeypatch.setattr(supervisor, "_room", lambda config: Place(Layout(1, 1), ("n",)))
        monkeypatch.setattr(supervisor, "_trainer", lambda *_: SimpleNamespace(fit=lambda: next(left)()))
        supervisor.supervise(config, lambda settings: None)
        assert list(left) == []

    return lambda changes, groups: supervise(settings_in(tmp_path, changes), groups)


def dies():
    raise WorkerGroupError("a worker died", worker_failures={0: RuntimeError("out of memory")})


def ends():
    return SimpleNamespace(return_value=None)


def test_a_failing_file_system_is_waited_for_and_costs_no_restart_of_another_kind(run, monkeypatch, capsys):
    listdir, failing = files.listdir, []

    def fail(path):
        if failing and failing.pop():
            raise OSError(errno.EIO, "Input/output error")
        return listdir(path)

    monkeypatch.setattr(files, "listdir", fail)

    def dies_with_the_disk():
        failing.extend([True, True, False, True])
        dies()

    run({"cluster.max_failures": 1, "cluster.read_retry_s": 30}, [dies_with_the_disk, ends])
    assert not failing
    assert "a worker failed (out of memory); starting again (0 restarts left)" in capsys.readouterr().out


def test_a_file_system_that_stays_away_is_what_the_job_ends_with(run, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "listdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run({"cluster.read_retry_s": 0.2}, [ends])


@pytest.mark.parametrize("out", ["{tmp}/run", "memory://supervised/run"])
def test_ray_train_keeps_its_state_at_any_url(tmp_path, out):
    config = settings_in(tmp_path, {"out": out.format(tmp=tmp_path)})
    trainer = supervisor._trainer(config, lambda settings: None, Place(Layout(1, 1), ("n",)), "1", None)
    there = cloudpickle.loads(cloudpickle.dumps(trainer.run_config)).storage_context  # as its actors have it
    with there.storage_filesystem.open_output_stream(f"{there.experiment_fs_path}/state") as file:
        file.write(b"state")
    assert files.read_bytes(f"{config.out}/ray_train/run/state") == b"state"


def test_a_store_that_stays_away_counts_as_a_failure_and_no_mistake(run, capsys):
    def away():
        raise WorkerGroupError("a worker died", worker_failures={0: Unreachable("s3://b/store: no answer")})

    run({"cluster.max_failures": 2}, [away, away, ends])
    assert "train: s3://b/store: no answer; starting again (1 restarts left)" in capsys.readouterr().out
    with pytest.raises(WorkerGroupError):
        run({"cluster.max_failures": 1}, [away, away])


def test_a_mistake_ends_the_job_at_once(run):
    def mistaken():
        raise WorkerGroupError("a worker died", worker_failures={0: UserError("chunk_1.hdf5: altered")})

    with pytest.raises(UserError, match=r"chunk_1\.hdf5: altered"):
        run({"cluster.max_failures": 2}, [mistaken])


def test_only_a_newer_checkpoint_gives_restarts_back(run, tmp_path, capsys):
    folder = tmp_path / "run"

    def step_8():
        files.write_json(f"{folder}/checkpoints/step_8/complete.json", {"step": 8})
        dies()

    def loses_it():
        files.remove(f"{folder}/checkpoints/step_8")
        dies()

    run({"cluster.max_failures": 2}, [step_8, loses_it, ends])
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition("; ")[2] for line in said] == [
        "going on from step 8 (1 restarts left)",
        "starting again (0 restarts left)",
    ]


def test_a_damaged_checkpoint_is_said_and_passed_over(run, tmp_path, capsys):
    def torn():
        for step in (4, 8):
            path = f"{tmp_path}/run/checkpoints/step_{step}"
            files.write_bytes(f"{path}/0.distcp", b"12345678")
            files.write_json(f"{path}/complete.json", {"step": step, "files": {"0.distcp": step}})
        dies()

    run({}, [torn, ends])
    said = capsys.readouterr().out
    assert "step_4: damaged, passed over: 0.distcp has 8 of 4 bytes" in said
    assert "going on from step 8" in said


def test_a_run_directory_that_comes_back_is_waited_for_and_one_that_does_not_is_said(run, tmp_path, capsys):
    folder, away = tmp_path / "run", tmp_path / "away"
    files.write_json(f"{folder}/checkpoints/step_8/complete.json", {"step": 8})

    def unmounted():
        folder.rename(away)
        threading.Timer(0.5, lambda: away.rename(folder)).start()
        dies()

    run({"cluster.max_failures": 2, "cluster.read_retry_s": 30}, [unmounted, ends])
    assert "going on from step 8 (1 restarts left)" in capsys.readouterr().out

    def gone():
        files.remove(str(folder))
        dies()

    with pytest.raises(UserError, match=r"run: the run directory is gone \(looked for 0.3 s\)"):
        run({"cluster.read_retry_s": 0.3}, [gone])


def test_a_store_that_is_away_when_a_worker_starts_is_waited_for(tmp_path):
    config = settings_in(tmp_path, {"cluster.read_retry_s": 0.5})
    with pytest.raises(Unreachable, match="no activations here"):
        train._opened(config)
    make_store(tmp_path / "mounted")
    threading.Timer(0.7, lambda: (tmp_path / "mounted/store").rename(tmp_path / "store")).start()
    data = train._opened(config.override({"cluster.read_retry_s": 30}))
    assert (data.manifest.tokens, data.patience) == (203, 30)
