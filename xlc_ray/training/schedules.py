"""Schedules: a factor in [0, 1] for each step of a run, applied to the learning rate or to a penalty's weight.

warm-up     (i + 1) / w for the first w steps i
linear      1, then down to `end` over the last `decay` share of the run
cosine      end + (1 - end) (1 + cos πu) / 2, u from 0 to 1 in each of `cycles` equal parts after the warm-up
"""

from __future__ import annotations

import math

from xlc_ray.config.training import Constant, Cosine, Linear, Schedule


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor at step `step` (from 0) of `steps`."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    match schedule:
        case Constant():
            return 1.0
        case Linear(decay=decay, end=end):
            length = decay * steps
            left = (steps - step) / length if length else 1.0
            return end + (1 - end) * min(1.0, left)
        case Cosine(cycles=cycles, end=end):
            u = (step - warmup) / max(1, steps - warmup) * cycles % 1.0
            return end + (1 - end) * (1 + math.cos(math.pi * u)) / 2
