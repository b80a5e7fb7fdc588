"""What follows one worker group, without any: where Ray Train is not asked."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.train.v2.api.exceptions import WorkerGroupError

from tests.runs import settings_in
from xlc_ray import files
from xlc_ray.cluster import supervisor
from xlc_ray.cluster.placement import Layout, Place
from xlc_ray.config import Config


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(changes, groups): supervise groups that each do as told; the attempts that were made."""

    def supervise(config: Config, groups: list) -> None:
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
        failing.extend([True, True, False, True, True, False, True])
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
