"""A gate whose training fails, for tests of what a sweep makes of it."""

from __future__ import annotations

import os

from xlc_ray.dictionary import gates


class Broken(gates.ReLU):
    """Ends its process at a step while the file `until` is missing, or raises there."""

    def __init__(self, sizes, shards, at: int, marker: str | None = None):
        super().__init__(sizes, shards)
        self.at, self.marker = at, marker

    def start_step(self, step: int, steps: int) -> None:
        super().start_step(step, steps)
        if step != self.at:
            return
        if self.marker is None:
            raise RuntimeError("this gate never works")
        if not os.path.exists(self.marker):
            with open(self.marker, "w"):
                pass
            os._exit(1)
