"""A sweep in one process, trial after trial: for debuggers, and for small sweeps where starting workers is the work."""

from __future__ import annotations

import torch

from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards
from xlc_ray.sweeps.board import DONE, Board
from xlc_ray.sweeps.rank import PREFIX, TrialRank, measured
from xlc_ray.sweeps.space import Trial
from xlc_ray.training import Diverged, loop


def run_trial(board: Board, trial: Trial) -> None:
    """Train a trial in this process until it is cut or has come to its end; `cluster` settings play no part.

    A trial that diverges, or whose settings its data refuse, is failed; any other error is a defect and is raised."""
    if board.rows[trial.name].state in DONE:
        return
    board.started(trial.name)
    try:
        step = loop.prepare(trial.config) or 0
        for stop, metrics in measured(trial.config.out).items():  # of an earlier session
            if stop <= step and not board.reached(trial.name, stop, metrics):
                return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rank = TrialRank(trial.config, board.stops(trial), Shards(), device, predictions=board.predictions)
        try:
            while _reached(board, trial, rank.advance()):
                pass
        finally:
            rank.close()
    except (Diverged, UserError) as error:
        board.failed(trial.name, str(error))


def _reached(board: Board, trial: Trial, line: dict[str, float]) -> bool:
    found = {name.removeprefix(PREFIX): value for name, value in line.items() if name.startswith(PREFIX)}
    return board.reached(trial.name, int(line["step"]), found)
