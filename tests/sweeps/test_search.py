"""What Optuna proposes, against a frontier that is known."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.sweeps.make import sweep_in
from xlc_ray.sweeps.board import Board
from xlc_ray.sweeps.search import Proposals


def measured(lr: float) -> dict[str, float]:
    """Sparser for more fvu up to lr = 0.01, where no feature is left: sparser still, and worth nothing."""
    above = math.log10(lr) + 4
    return {"l0": 0.0, "fvu": 1.05} if above > 2 else {"l0": 100 * 4**-above, "fvu": 0.1 + 0.3 * above}


def propose(proposals: Proposals, count: int) -> list[float]:
    """Learning rates that are proposed, each answered by what it measures."""
    found = []
    for _ in range(count):
        (trial,) = proposals.next() or pytest.fail("nothing proposed")
        row = proposals.board.rows[trial.name]
        proposals.board.rows[trial.name] = done = dataclasses.replace(
            row, state="finished", metrics=measured(trial.config.train.lr)
        )
        proposals.tell(done)
        found.append(trial.config.train.lr)
    return found


@pytest.mark.parametrize("resumed", [False, True])
def test_dictionaries_without_active_features_do_not_draw_the_search(tmp_path, resumed):
    space = {"train.lr": {"loguniform": [1e-4, 1.0]}}
    sweep = sweep_in(tmp_path, space=space, search={"kind": "optuna", "num_samples": 80})
    proposals = Proposals(sweep, Board(sweep), {})
    first = propose(proposals, 40)
    if resumed:
        proposals = Proposals(sweep, Board(sweep), proposals.board.rows)
    later = propose(proposals, 40)
    assert len(set(first + later)) == 80
    assert sum(lr > 0.01 for lr in later) <= 4  # half of them, were they drawn at random


def test_points_between_corners_that_do_not_fit_together_are_passed_over(tmp_path):
    space = {"train.batch_tokens": {"randint": [36, 44]}}  # the odd ones do not divide
    changes = {"cluster.replicas": 2}
    sweep = sweep_in(tmp_path, changes, space=space, search={"kind": "optuna", "num_samples": 9})
    proposals = Proposals(sweep, Board(sweep), {})
    found = []
    while group := proposals.next():
        found.append(group[0].config.train.batch_tokens)
        row = dataclasses.replace(proposals.board.rows[group[0].name], state="finished", metrics=measured(0.001))
        proposals.board.rows[group[0].name] = row
        proposals.tell(row)
    assert sorted(found) == [36, 38, 40, 42, 44]
    assert proposals.left == 0


def test_what_a_trial_measured_before_it_failed_does_not_draw_the_search(tmp_path):
    space = {"train.lr": {"loguniform": [1e-4, 1.0]}}
    sweep = sweep_in(tmp_path, space=space, search={"kind": "optuna", "num_samples": 2})
    proposals = Proposals(sweep, Board(sweep), {})
    for state in ("failed", "stopped"):
        (trial,) = proposals.next()
        proposals.tell(dataclasses.replace(proposals.board.rows[trial.name], state=state, metrics=measured(0.001)))
    assert [told.state.name for told in proposals.study.trials] == ["FAIL", "COMPLETE"]
