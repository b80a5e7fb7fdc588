"""TP 1 = 2 = 4 and DP 1 = 2, for every wiring × gate, in float64, against a process without a process group.

The reference multiplies densely, the ranks sparsely: that both agree is tested on the way.

Pitfalls 1, 2, 3, 4 and 20: gathered duplicates, all-reduce backward, clipping by local norms, drifting replicated
parameters, initialisation that depends on the world size.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.equivalence import cases
from xlc_ray.dictionary import Shards

LAYOUTS = {"tp2": (2, 2), "tp4": (4, 4), "dp2": (2, 1), "tp2_dp2": (4, 2)}


def alone(which: str) -> dict:
    assert not dist.is_initialized()
    return {case: cases.run(case, Shards(), **{"dictionary.products": "dense"}) for case in cases.SETS[which]}


@pytest.fixture(scope="module")
def reference():
    return alone("fast")


FOUR = [pytest.param(name, marks=pytest.mark.slow) for name in ("tp4", "tp2_dp2")]


@pytest.fixture(scope="module", params=["tp2", "dp2", *FOUR])
def parallel(request, tmp_path_factory):
    return together(request.param, tmp_path_factory.mktemp(request.param), "fast")


def together(layout: str, folder: Path, which: str) -> tuple[list, int, dict]:
    """What each rank found in each case, ranks a replica, and the collectives of each case: forward passes, steps."""
    world, tp = LAYOUTS[layout]
    command = [sys.executable, "-m", "tests.equivalence.worker"]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*command, str(r), str(world), str(tp), str(folder / "store"), str(folder), which], cwd=root)
        for r in range(world)
    ]
    assert [p.wait(timeout=1200) for p in ranks] == [0] * world
    saved = [torch.load(folder / f"rank_{r}.pt", weights_only=False) for r in range(world)]
    return [results for results, _ in saved], tp, saved[0][1]


@pytest.mark.parametrize("case", cases.SETS["fast"], ids="-".join)
def test_parallel_training_equals_one_process(reference, parallel, case):
    ranks, tp, _ = parallel
    assert_equal(reference[case], ranks, tp, case)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp4", "tp2_dp2"])
def test_every_gate_in_every_wiring(layout, tmp_path):
    want = alone("rest")
    ranks, tp, spoken = together(layout, tmp_path, "rest")
    for case in cases.SETS["rest"]:
        assert_equal(want[case], ranks, tp, case)
        assert_speaks_twice_at_most(spoken[case][0], tp, len(ranks) // tp, case)
        assert_a_step_adds_no_more_than_it_must(*spoken[case], tp, len(ranks) // tp, case)


def assert_equal(reference: dict, ranks: list, tp: int, case: tuple[str, str]) -> None:
    for name, want in reference.items():
        if name not in ranks[0][case]:
            assert name.endswith("explained_variance")
            continue
        for replica in range(len(ranks) // tp):
            own = [r[case][name] for r in ranks[replica * tp : (replica + 1) * tp]]
            if cases.sharded_size(name, case):
                torch.testing.assert_close(torch.cat(own), want, rtol=1e-9, atol=1e-9, msg=name)
            else:
                for got in own:
                    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", cases.SETS["fast"], ids="-".join)
def test_a_forward_pass_speaks_twice_at_most(parallel, case):
    """Pitfall 7: one all-reduce for the reconstruction, one small collective for thresholds."""
    ranks, tp, spoken = parallel
    assert_speaks_twice_at_most(spoken[case][0], tp, len(ranks) // tp, case)


def assert_speaks_twice_at_most(forwards: list, tp: int, replicas: int, case: tuple[str, str]) -> None:
    assert len(forwards) == cases.STEPS
    written = sum(cases.WIRINGS[case[0]].widths[s] for s in cases.WIRINGS[case[0]].written_sites)
    _, loss = (cases.GATES | cases.MORE_GATES)[case[1]]
    codes = 1 + len(loss.get("matryoshka", {"prefixes": [1]})["prefixes"])  # AuxK's or a frozen one in the same buffer
    statistics = "zscore" in case[1] and replicas > 1  # of the batch that replicas share
    for counts, sizes in forwards:
        assert counts["all_reduce"] == (tp > 1) + statistics
        assert counts["all_gather_into_tensor"] <= ("topk" in case[1])
        assert counts.total() == counts["all_reduce"] + counts["all_gather_into_tensor"]
        assert sizes.get("all_reduce", 0) <= codes * cases.ROWS * written


@pytest.mark.parametrize("case", cases.SETS["fast"], ids="-".join)
def test_a_step_adds_the_mean_of_gradients_one_small_sum_and_one_more_at_most(parallel, case):
    """Pitfall 7 of backward, clipping, the update and metrics: 6 in all at most, 8 where metrics are measured."""
    ranks, tp, spoken = parallel
    assert_a_step_adds_no_more_than_it_must(*spoken[case], tp, len(ranks) // tp, case)


def assert_a_step_adds_no_more_than_it_must(forwards, steps, tp: int, replicas: int, case: tuple[str, str]) -> None:
    assert [measured for measured, _ in steps] == [i in (0, cases.STEPS - 1) for i in range(cases.STEPS)]
    sparsity = (cases.GATES | cases.MORE_GATES)[case[1]][1].get("sparsity", {})
    averaged = "target_l0" in sparsity or sparsity.get("kind") == "lp"  # over the global batch
    threshold = case[1].startswith("topk") and replicas > 1  # of inference, where tokens compete by themselves
    for (forward, _), (measured, calls) in zip(forwards, steps, strict=True):
        least = forward.total() + (1 + measured) * ((tp > 1) + (replicas > 1))
        assert least <= calls <= least + (averaged or threshold)
        assert calls <= 6 + 2 * measured


def test_the_cases_exercise_dead_features_and_clipping(reference):
    """Guards the test above against silently easy cases."""
    dead = [v for c in reference for k, v in reference[c].items() if k.endswith("dead_features")]
    norms = [v for c in reference for k, v in reference[c].items() if k.endswith("grad_norm")]
    assert any(0 < d < 1 for d in dead)
    for gate in ("topk_resampled", "jumprelu_resampled"):
        started = [v for c in cases.CASES if c[1] == gate for k, v in reference[c].items() if k.endswith(".resampled")]
        assert len(started) == 3 * 4  # wirings x resamplings
        assert sum(n > 3 for n in started) > 6
    ghosts = [v for c in cases.CASES for k, v in reference[c].items() if k.endswith(".ghost")]
    assert any(v > 0 for v in ghosts)
    assert any(n > 0.5 for n in norms)
