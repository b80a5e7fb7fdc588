"""A sweep in one process, trial after trial: for debuggers, and for small sweeps where starting workers is the work."""

from __future__ import annotations

import torch

from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards
from xlc_ray.sweeps.board import Board
from xlc_ray.sweeps.rank import Task, TrialRank
from xlc_ray.sweeps.search import Group
from xlc_ray.training import Diverged, loop
from xlc_ray.training.saving import Stop


def run_group(board: Board, group: Group) -> None:
    """Train trials that share a stream in this process until all are cut or at their end; `cluster` settings play no
    part.

    A trial that diverges, or whose settings its data refuse, is failed; any other error is a defect and is raised."""
    ready = []
    for trial in group:
        board.started(trial.name)
        try:
            loop.prepare(trial.config)
            ready.append(board.task(trial))
        except UserError as error:
            board.failed(trial.name, str(error))
    try:
        if ready:
            _train(board, ready)
    except UserError as error:
        if len(group) == 1:
            board.failed(group[0].name, str(error))
            return
        left = board.left(task.name for task in ready)  # whose mistake it is shows when each is by itself
        for trial in group:
            if trial.name in left:
                run_group(board, (trial,))


def _train(board: Board, tasks: list[Task]) -> None:
    rank = TrialRank(tasks, Shards(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        while board.left(task.name for task in tasks):
            _advance(board, rank)
    finally:
        rank.close()


def _advance(board: Board, rank: TrialRank) -> None:
    step, found = rank.advance()
    for name, said in found.items():
        match said:
            case Diverged():
                board.diverged(name, str(said))
            case Stop():
                board.asked_to_stop(name, step)
    came = {name: said for name, said in found.items() if not isinstance(said, Exception)}
    on = board.reached(step, came)
    rank.leave(set(came) - set(on))
