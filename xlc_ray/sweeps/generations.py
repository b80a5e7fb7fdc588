"""A population's trials, generation after generation (pbt.py): each trains to the next stop, then gives its workers up.

When the whole population is there, whoever is replaced gets a copy of the other's checkpoint and settings of its own;
then sweep.json says so, and the next generation begins. A sweep that is killed before that line decides and copies
once more, to the same end: nobody trains meanwhile, and who is copied is not replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

from xlc_ray import files
from xlc_ray.config import Config
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.dictionary import checkpoint
from xlc_ray.sweeps.board import Board, Row
from xlc_ray.sweeps.pbt import population
from xlc_ray.sweeps.search import Group, Listed, grouped
from xlc_ray.sweeps.space import Trial, make


class Generations(Listed):
    """The search of a population."""

    def __init__(self, sweep: SweepConfig, listed: list[Trial], board: Board, before: Mapping[str, Row]):
        """Raises UserError where the population is too small."""
        super().__init__([], board, before)
        self.sweep, self.board = sweep, board
        self.population = population(sweep, [trial.name for trial in listed])
        self.running: set[str] = set()
        self.sharing: tuple[Callable[[Trial], Hashable], tuple[int | None, ...]] | None = None
        rows = [board.add(trial, before) for trial in listed]
        self.stops = (*board.comparisons, sweep.base.train.steps)
        self.begun = max(map(self._begun, rows))
        for row in rows:  # what failed is tried again, unless the population went on without it
            if row.state == "failed" and row.step == self.begun:
                row.state, row.error = "waiting", None
        self._gather()

    def _begun(self, row: Row) -> int:
        """The step at which a trial's generation began."""
        came = row.state == "finished" or (row.state == "paused" and not row.error)
        return max(stop for stop in (0, *self.stops) if stop < row.step or (stop == row.step and not came))

    def _gather(self) -> None:
        """Trials that wait, as they are now."""
        self.listed = self._in("waiting")
        self.waiting.extend((trial,) for trial in self.listed)
        if self.sharing:
            super().share(self.sharing[0], *self.sharing[1])

    def _in(self, *states: str) -> list[Trial]:
        rows = [row for row in self.board.rows.values() if row.state in states]
        return [make(self.sweep, row.changes, row.trial) for row in rows]

    @property
    def left(self) -> int:
        """Trainings of a trial to a stop."""
        living = len(self.board.left(self.board.rows)) + len(self._paused())
        return super().left + living * max(0, sum(stop > self.begun for stop in self.stops) - 1)

    def share(self, stream: Callable[[Trial], Hashable], *most: int | None) -> int:
        self.sharing = stream, most
        super().share(stream, *most)
        return max(map(len, grouped(self._in("waiting", "paused"), stream, *most)), default=1)

    def part(self, trials: Iterable[Trial]) -> None:
        trials = list(trials)
        self.running -= {trial.name for trial in trials}
        super().part(trials)

    def next(self) -> Group | None:
        """None, too, while others of the generation train."""
        if not self.waiting and not self.running:
            self._breed()
        group = super().next()
        self.running |= {trial.name for trial in group or ()}
        return group

    def tell(self, row: Row) -> None:
        self.running.discard(row.trial)

    def _breed(self) -> None:
        """Begin the next generation, if there is one."""
        if not (rows := self._paused()):
            return
        step = next(stop for stop in self.stops if stop > self.begun)
        measured = {row.trial: {} if row.error else row.metrics for row in rows}
        moves = self.population.decide(step, measured, {row.trial: row.changes for row in rows})
        for name, move in moves.items():
            take_over(make(self.sweep, move.changes, name).config, self._out(move.source), step)
        self.board.next_generation(step, moves)
        self.begun = step
        self._gather()

    def _paused(self) -> list[Row]:
        return [row for row in self.board.rows.values() if row.state == "paused"]

    def _out(self, name: str) -> str:
        return files.join(self.sweep.out, self.board.rows[name].out)


def take_over(config: Config, source: str, step: int) -> None:
    """Make the run directory of these settings hold them, and the checkpoint of another run: what a run that goes on by
    itself may never change. Its lines of metrics stay: they are what it measured."""
    files.write_bytes(files.join(config.out, "config.yaml"), config.yaml().encode())
    checkpoint.adopt(config.out, source, step)
