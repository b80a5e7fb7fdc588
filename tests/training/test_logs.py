"""Where a run's metrics go."""

from unittest.mock import MagicMock

import pytest
import wandb

from xlc_ray.config import UserError
from xlc_ray.training import logs


@pytest.mark.parametrize("group", [None, "sweep"])
def test_runs_of_equal_last_names_are_different_runs_of_wandb(small_run, tmp_path, monkeypatch, group):
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **given: runs.append(given) or MagicMock())
    project = {"project": "tests", "group": group}
    outs = [(str(tmp_path / folder / "sae"), seed) for folder, seed in (("a", 0), ("b", 0), ("a", 1), ("a", 0))]
    for out, seed in outs:
        logs.Log(small_run({"train.wandb": project, "out": out, "seed": seed}))
    ids = [run["id"] for run in runs]
    assert len(set(ids)) == 3
    assert ids[3] == ids[0]  # one that is resumed
    assert {run["name"] for run in runs} == {"sae"}


def test_wandb_without_a_login_is_one_line(small_run, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"train\.wandb: No API key configured\.; wandb login, or set .*mode: offline"):
        logs.Log(small_run({"train.wandb": {"project": "tests"}}))
