"""Trials as they come on: on a terminal those that run are redrawn below those that are done, else a line a stop.

batchtopk,k=32,lr=0.002    300/300   fvu 0.1787   l0 25.9   finished
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from xlc_ray import files
from xlc_ray.sweeps.board import DONE, FILE, Row
from xlc_ray.sweeps.result import Sweep


class Table:
    """Follows a board: its `changed`."""

    def __init__(self, stream: TextIO | None = None):
        self.width, self.stream = 0, stream or sys.stdout
        self.terminal, self.drawn = self.stream.isatty(), 0
        self.said: dict[str, int] = {}

    def __call__(self, row: Row, rows: Sequence[Row]) -> None:
        self.width = max(len(one.trial) for one in rows)
        told = row.state in DONE or moved(row) != ""
        if self.terminal:
            running = [one for one in rows if one.state == "running"]
            columns = shutil.get_terminal_size().columns  # a line that wraps is more than is drawn over
            shown = [self.line(row)] * told + [self.line(one)[:columns] for one in running]
            back = f"\x1b[{self.drawn}A\x1b[J" if self.drawn else ""
            self.stream.write(back + "".join(f"{line}\n" for line in shown))
            self.drawn = len(running)
        elif told or (row.metrics and row.step != self.said.get(row.trial)):
            self.said[row.trial] = row.step
            self.stream.write(self.line(row) + "\n")
        self.stream.flush()

    def line(self, row: Row) -> str:
        """One trial."""
        parts = [f"{row.trial:<{self.width}}", f"{row.step:>6,}/{row.steps:,}"]
        parts += [
            f"{name} {row.metrics[name]:{form}}"
            for name, form in (("fvu", ".4f"), ("l0", "6.1f"))
            if row.metrics.get(name) is not None
        ]
        parts.append(moved(row) or row.state)
        if row.error:
            parts.append(row.error[:120])
        return "   ".join(parts)


def moved(row: Row) -> str:
    """From whom a trial that has just been replaced goes on, and with what; else nothing."""
    last = row.history[-1] if row.state == "waiting" and row.history else {}
    if not last.get("from") or last["step"] != row.step:
        return ""
    return f"goes on from {last['from']}: " + ", ".join(f"{path}={value}" for path, value in last["settings"].items())


def summary(sweep: Sweep) -> str:
    """What a sweep found, for the end of a job: the frontier, and the counts of sweep.json."""
    counts, best = files.read_mapping(files.join(sweep.out, FILE)), sweep.pareto()
    width = max(map(len, best["trial"]), default=0)
    told = f", {counts['replaced']} times replaced" if counts.get("replaced") else ""
    lines = [f"{'frontier':<{width}}{'l0':>9}{'fvu':>9}"]
    lines += [f"{row.trial:<{width}}{row.l0:>9.1f}{row.fvu:>9.4f}" for row in best.itertuples()]
    lines += [
        f"{counts['trials']} trials: {counts['finished']} finished, {counts['stopped']} stopped early, "
        f"{counts['failed']} failed{told}; {counts['share_of_full_steps']:.0%} of the steps of all to the end",
        f"sweep directory: {sweep.out}",
    ]
    return "\n".join(lines)
