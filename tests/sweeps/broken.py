"""A gate whose training fails, for tests of what a sweep makes of it."""

from __future__ import annotations

import os

from xlc_ray.config import UserError
from xlc_ray.dictionary import gates


class Broken(gates.ReLU):
    """Ends its process at a step while the file `marker` is missing, or raises there: as a user's mistake, or not. Only
    on one `rank` of those that share the features, if that is given."""

    def __init__(
        self, sizes, shards, at: int, marker: str | None = None, mistake: bool = False, rank: int | None = None
    ):
        super().__init__(sizes, shards)
        self.here = rank in (None, shards.rank)
        self.at, self.marker, self.mistake = at, marker, mistake

    def start_step(self, step: int, steps: int) -> None:
        super().start_step(step, steps)
        if step != self.at or not self.here:
            return
        if self.mistake:
            raise UserError("gate: a mistake")
        if self.marker is None:
            raise RuntimeError("this gate never works")
        if not os.path.exists(self.marker):
            with open(self.marker, "w"):
                pass
            os._exit(1)
