"""A rank never holds more than its share and one layer, whatever it does (pitfall 5): measured in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.equivalence import memory

RANKS, SLACK = 4, 12e6
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peaks"),
]


def test_a_rank_holds_its_share_and_one_layer(tmp_path):
    command = [sys.executable, "-m", "tests.equivalence.memory"]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen([*command, str(r), str(RANKS), str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
        for r in range(RANKS)
    ]
    outputs = [p.communicate(timeout=300)[0] for p in running]
    assert [p.returncode for p in running] == [0] * RANKS
    for output in outputs:
        found = json.loads(output.splitlines()[-1])
        own = found["parameters"]
        # Each limit is less than the whole of it would take: own x 4, and x 12 with moments.
        assert found["build"] < own + SLACK
        assert found["save"] < 3 * own + SLACK  # with two moments
        assert found["load"] < 3 * own + memory.LARGEST + SLACK
        assert found["save in background"] < 6 * own + SLACK  # with the copy that is being written
