"""A trial that another terminal asks to stop, and sweeps that are none."""

from __future__ import annotations

import pytest

from tests.sweeps.make import sweep_in
from xlc_ray import files
from xlc_ray.cluster.sweep import sweep
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.training.saving import REQUEST

SINGLE = {"train.precision": "float32"}
"""In which 1e30 squared is not finite."""


@pytest.mark.parametrize("shared", [False, True])
def test_it_ends_at_its_next_checkpoint_and_its_sweep_goes_on_without_it(tmp_path, shared):
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep_in(tmp_path, space={"train.lr": {"choice": [0.01, 0.003]}}, share_activations=shared).yaml())
    files.write_bytes(f"{tmp_path}/sweep/trials/lr=0.01/{REQUEST}", b"")
    found = sweep(str(path), local=True).frame()
    assert list(zip(found["state"], found["step"], strict=True)) == [("stopped", 8), ("finished", 12)]
    assert checkpoint.steps(found["out"][0])[-1] == 8, "told of the one at 4, it writes one more"
    assert not files.exists(f"{found['out'][0]}/{REQUEST}")
    again = sweep(str(path), local=True).frame()
    assert list(again["state"]) == ["stopped", "finished"], "it counts as cut"


def test_a_sweep_of_which_every_trial_failed_is_no_success(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep_in(tmp_path, space={"train.lr": {"choice": [1e30, 1e29]}}, changes=SINGLE).yaml())
    with pytest.raises(UserError, match=r"sweep: every trial failed, lr=1e\+30 by: "):
        sweep(str(path), local=True).check()


def test_the_directory_of_a_run_is_none_of_a_sweep(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep_in(tmp_path, space={"train.lr": {"choice": [0.01]}}).yaml())
    files.write_bytes(f"{tmp_path}/sweep/config.yaml", b"seed: 1")
    with pytest.raises(UserError, match="sweep: holds a run; choose another --out"):
        sweep(str(path), local=True)
