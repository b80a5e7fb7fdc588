"""Trials in the terminal: redrawn in place on one, a line at each change elsewhere.

batchtopk,k=32,lr=0.002    300/300   fvu 0.1787   l0 25.9   finished
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from xlc_ray.sweeps.board import DONE, Row


class Table:
    """Follows a board: its `changed`."""

    def __init__(self, stream: TextIO | None = None):
        self.width, self.stream = 0, stream or sys.stdout
        self.terminal, self.drawn = self.stream.isatty(), 0

    def __call__(self, row: Row, rows: Sequence[Row]) -> None:
        self.width = max(len(one.trial) for one in rows)
        if self.terminal:
            back = f"\x1b[{self.drawn}A" if self.drawn else ""
            self.stream.write(back + "".join(f"{self.line(one)}\x1b[K\n" for one in rows))
            self.drawn = len(rows)
        elif row.state in DONE or row.metrics:
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
        parts.append(row.state)
        if row.error:
            parts.append(row.error[:120])
        return "   ".join(parts)
