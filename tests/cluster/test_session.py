"""Where jobs find their input and put their output, and what they ask of the cluster."""

from __future__ import annotations

import pytest

from xlc_ray.cluster.session import connect, require, resolve
from xlc_ray.config import UserError


@pytest.fixture
def config(tiny_config):
    return tiny_config("base").override({"model.name": "org/model", "text.dataset": "org/text"})


def test_relative_paths_start_from_the_working_directory(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XLC_ROOT", raising=False)
    found = resolve(config)
    assert (found.out, found.source.path) == (f"{tmp_path}/base/run", f"{tmp_path}/base/store")
    assert (found.model.name, found.text.dataset) == ("org/model", "org/text")
    assert resolve(found) == found


def test_root_is_an_environment_variable(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XLC_ROOT", str(tmp_path / "shared"))
    assert resolve(config).out == f"{tmp_path}/shared/base/run"


def test_local_model_and_text_become_absolute(config, tmp_path, monkeypatch):
    (tmp_path / "org/model").mkdir(parents=True)
    (tmp_path / "org/text").mkdir()
    monkeypatch.chdir(tmp_path)
    found = resolve(config.override({"text.dataset": "org/text/*.txt"}))
    assert (found.model.name, found.text.dataset) == (f"{tmp_path}/org/model", f"{tmp_path}/org/text/*.txt")


def test_datasets_of_a_mixture_become_absolute_where_they_are_local(config, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    parts = [{"dataset": "books", "weight": 3}, {"dataset": "org/text", "column": "messages"}]
    found = resolve(config.override({"text.dataset": None, "text.mixture": parts})).text.mixture
    assert [(part.dataset, part.weight) for part in found] == [(f"{tmp_path}/books", 3), ("org/text", 1)]
    assert found[1].column == "messages"


def test_another_run_is_found_as_by_evaluation(config, tmp_path, monkeypatch):
    (tmp_path / "runs/sae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = resolve(config.override({"train.loss.connection": {"run": "runs/sae", "coefficient": 1.0}}))
    assert found.train.loss.connection.run == f"{tmp_path}/runs/sae"


def test_urls_and_absolute_paths_stay(config):
    found = resolve(config.override({"out": "s3://bucket/run", "source.path": "/data/store"}))
    assert (found.out, found.source.path) == ("s3://bucket/run", "/data/store")


def test_a_job_in_a_temporary_copy_writes_to_the_home_directory_and_says_so(config, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_0123abcd"
    (copy / "org/model").mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("XLC_ROOT", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    found = resolve(config)
    assert (found.out, found.model.name) == ("/home/someone/xlc_ray/base/run", f"{copy}/org/model")
    assert capsys.readouterr().out.count("/home/someone/xlc_ray/base/run") == 1
    resolve(found)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "last", "said"),
    [
        ("127.0.0.1:1", None, "cluster: 127.0.0.1:1 (by RAY_ADDRESS) cannot be joined: "),
        (None, "127.0.0.1:1", "cluster: 127.0.0.1:1 (by the last `ray start` on this machine) cannot be joined: "),
        ("head:x", None, "cluster: head:x (by RAY_ADDRESS) cannot be joined: "),
    ],
)
def test_a_cluster_that_is_gone_is_an_error_and_no_silent_wait(monkeypatch, given, last, said):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("xlc_ray.cluster.session.read_ray_address", lambda: last)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setenv("RAY_ADDRESS", given or "")
    with pytest.raises(UserError) as error:
        connect()
    assert str(error.value).startswith(said)
    assert "RAY_ADDRESS=local" in str(error.value)


@pytest.mark.cluster
def test_asking_for_more_than_the_cluster_has_is_an_error_and_no_silent_wait(cluster):
    require(4, 0, "this")
    with pytest.raises(UserError, match="harvesting needs 5 CPUs at once, the cluster has 4"):
        require(5, 0, "harvesting")
    with pytest.raises(UserError, match="needs 1 GPUs at once, the cluster has 0"):
        require(1, 1, "harvesting")
