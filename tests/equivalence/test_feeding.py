"""Every rank of a replica gets the batches that the leader reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.activations.build import make

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("how", "shared"), [("late", sys.platform == "linux"), ("apart", False)])
def test_two_ranks_take_the_same_batches(tmp_path, how, shared):
    make(tmp_path / "store", [50, 50, 50, 17])
    command = [sys.executable, "-m", "tests.equivalence.feeding"]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path), how], cwd=ROOT) for rank in range(2)]
    assert [p.wait(timeout=120) for p in running] == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{how}_{rank}.json").read_text()) == {"shared": shared, "wrong": None}
