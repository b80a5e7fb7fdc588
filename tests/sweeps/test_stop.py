"""A trial that another terminal asks to stop."""

from __future__ import annotations

import pytest

from tests.sweeps.make import sweep_in
from xlc_ray import files
from xlc_ray.cluster.sweep import sweep
from xlc_ray.dictionary import checkpoint
from xlc_ray.training.saving import REQUEST


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
