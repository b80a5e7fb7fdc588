"""End-to-end training: TP 1 = 2 and two replicas = two micro-batches, in float64, with the model on every rank."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.equivalence import spliced
from tests.training import texts
from xlc_ray.dictionary import Shards


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, [what each of two ranks found])."""
    folder = tmp_path_factory.mktemp("spliced")
    texts.make_store(folder)
    command = [sys.executable, "-m", "tests.equivalence.spliced"]
    root = Path(__file__).parents[2]
    started = [subprocess.Popen([*command, str(r), str(folder)], cwd=root) for r in range(2)]
    assert [p.wait(timeout=1200) for p in started] == [0, 0]
    return str(folder), [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(2)]


@pytest.mark.parametrize("case", spliced.CASES)
def test_two_shards_equal_one_process(ranks, case):
    folder, found = ranks
    for name, want in spliced.run(folder, case, Shards()).items():
        own = [split[case][name] for split, _, _ in found]
        if ".groups." in name:
            own = [torch.cat(own)]
        for got in own:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)


def test_two_replicas_equal_two_micro_batches(ranks):
    folder, found = ranks
    want = spliced.run(folder, "topk", Shards(), **{"train.accumulate": 2})
    for _, got, _ in found:
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=name)


def test_ranks_agree_on_a_gradient_that_they_computed_apart(ranks):
    for _, _, gradient in ranks[1]:
        assert gradient.tolist() == [1.5, 1.5, 1.5]
