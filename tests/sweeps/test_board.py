"""What a sweep that goes on knows of the trials of an earlier session."""

from __future__ import annotations

import json

import pytest

from tests.sweeps.make import sweep_in
from xlc_ray import files
from xlc_ray.sweeps.board import Board, read_rows
from xlc_ray.sweeps.space import trials

ASHA = {"grace": 4, "reduction": 2}


@pytest.fixture
def session(tmp_path):
    """session() → a board that goes on from the one before, and its two trials."""
    settings = sweep_in(tmp_path, asha=ASHA, search={"metric": "fvu"})

    def begin():
        board, listed = Board(settings), trials(settings)
        before = read_rows(settings.out)
        for trial in listed:
            board.add(trial, before)
        return board, *listed

    return begin


def measure(trial, step, fvu):
    """What its rank writes when it comes to a stop."""
    files.append(files.join(trial.config.out, "metrics.jsonl"), json.dumps({"step": step, "held_out/fvu": fvu}) + "\n")


def come(board, trial, step, fvu):
    measure(trial, step, fvu)
    return bool(board.reached(step, {trial.name: {"fvu": fvu}}))


@pytest.mark.parametrize("failed", [False, True])
def test_a_trial_keeps_the_rungs_that_it_has_passed_and_no_others(session, failed):
    board, first, second = session()
    assert come(board, first, 4, 0.5)
    assert come(board, second, 4, 0.1)
    assert come(board, second, 8, 0.1)
    if failed:
        board.failed(first.name, "its workers died")
    measure(first, 8, 0.5)  # and the driver is killed before it hears of that
    for _ in range(2):  # a session that ends before anybody has said anything changes nothing
        board, first, second = session()
        board.write()
        assert {row.trial: (row.state, row.step) for row in board.rows.values()} == {
            first.name: ("waiting", 4),
            second.name: ("waiting", 8),
        }
    assert come(board, first, 4, 0.5), "the other came later, and is better"
    assert come(board, second, 4, 0.1)
    assert board.rows[second.name].step == 8, "it does not come back to what it has behind it"
    assert not come(board, first, 8, 0.5)
    assert come(board, second, 8, 0.1)


def test_a_trial_that_was_cut_is_cut_where_it_was_whatever_its_run_did_later(session):
    board, first, second = session()
    assert come(board, first, 4, 0.1)
    assert not come(board, second, 4, 0.5)
    measure(second, 12, 0.01)  # jobs/train.py went on with it
    board, first, second = session()
    assert board.rows[second.name].state == "stopped"
    assert board.halving.decided[4, second.name] is False
