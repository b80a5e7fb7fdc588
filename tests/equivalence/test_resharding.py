"""A run that is cut short and goes on at another TP or DP equals one that was never interrupted, in one process.

Parameters, moments, counters of silence, thresholds and every metric of every step: so the order of data, schedules,
noise and resampling are the same too (pitfall 8).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equivalence import resharding
from tests.runs import final_state, make_store
from xlc_ray.dictionary import checkpoint
from xlc_ray.training import logs, train_alone

ROOT = Path(__file__).parents[2]
TIMES = ("tokens_per_s", "data_wait")


def ranks(world: int, tp: int, folder: Path, task: str, cases: list[str]) -> None:
    words = [str(world), str(tp), str(folder), task, *cases]
    command = [sys.executable, "-m", "tests.equivalence.resharding"]
    running = [subprocess.Popen([*command, str(r), *words], cwd=ROOT) for r in range(world)]
    assert [p.wait(timeout=300) for p in running] == [0] * world


def assert_goes_on_alike(folder: Path, case: str, place: str) -> None:
    whole, run = (resharding.settings(folder, case, p) for p in ("whole", place))
    want, got = final_state(whole), final_state(run)
    # What is quantised was rounded to float32 before, where the order of a sum may show.
    exact = 1e-6 if case == "int8" else 1e-9
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=exact, atol=exact, msg=f"{place} {case} {name}")
    before, after = logs.read(whole.out), logs.read(run.out)
    assert [line["step"] for line in after] == list(range(1, 13))
    for one, two in zip(before, after, strict=True):
        for key in one.keys() - {*TIMES, "explained_variance"}:  # of a replica's own rows
            assert two[key] == pytest.approx(one[key], rel=exact, abs=exact), (place, case, one["step"], key)


def cut_short(folder: Path, world: int, cases: list[str]) -> None:
    """Whole runs of one process, and the same ones saved by replicas of two ranks."""
    make_store(folder)
    for case in cases:
        train_alone(resharding.settings(folder, case, "whole"))
    ranks(world, 2, folder, "save", cases)
    for case in cases:
        assert checkpoint.steps(resharding.settings(folder, case, "saved").out) == [3, 6]


def go_on_alone(folder: Path, cases: list[str]) -> None:
    shutil.copytree(folder / "saved", folder / "tp1_dp1")
    for case in cases:
        train_alone(resharding.settings(folder, case, "tp1_dp1"))
        assert_goes_on_alike(folder, case, "tp1_dp1")


def test_what_two_ranks_saved_goes_on_in_one_process(tmp_path):
    cases = ["batchtopk", "hard_concrete"]
    cut_short(tmp_path, 2, cases)
    go_on_alone(tmp_path, cases)


@pytest.mark.slow
def test_what_two_replicas_of_two_ranks_saved_goes_on_in_any_layout(tmp_path):
    cases = list(resharding.CASES)
    cut_short(tmp_path, 4, cases)
    go_on_alone(tmp_path, cases)
    for world, tp in ((4, 4), (2, 2)):
        ranks(world, tp, tmp_path, "resume", cases)
        for case in cases:
            assert_goes_on_alike(tmp_path, case, f"tp{tp}_dp{world // tp}")
    lines = logs.read(resharding.settings(tmp_path, "resampled", "whole").out)
    assert sum(line.get("resampled", 0) for line in lines) > 3
    moments = final_state(resharding.settings(tmp_path, "int8", "whole"))["optimizer.groups.0.W_enc.exp_avg"]
    assert len(moments[:32].unique()) < 200  # one block has at most 256 values: quantised they were
