"""Runs of several ranks that share a stream are, bit for bit, what each is on a stream of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equivalence import sharing
from tests.runs import final_state, make_store
from xlc_ray.dictionary.checkpoint import steps

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 1])
def test_two_ranks_that_share_a_stream_change_no_bit(tmp_path, tp):
    make_store(tmp_path)
    command = [sys.executable, "-m", "tests.equivalence.sharing"]
    running = [subprocess.Popen([*command, str(r), "2", str(tp), str(tmp_path)], cwd=ROOT) for r in range(2)]
    assert [p.wait(timeout=300) for p in running] == [0, 0]
    for case in sharing.CASES:
        alone, shared = (sharing.settings(tmp_path, case, place) for place in ("alone", "shared"))
        last = sharing.LEAVES[1] if case == sharing.LEAVES[0] else shared.train.steps
        assert steps(shared.out)[-1] == last
        want, got = final_state(alone, last), final_state(shared)
        assert want.keys() == got.keys()
        for name in want:
            assert torch.equal(got[name], want[name]), (case, name)
