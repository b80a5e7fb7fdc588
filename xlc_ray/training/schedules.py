"""Schedules: a factor in [0, 1] for each step of a run, applied to the learning rate or to a penalty's weight.

warm-up     (i + 1) / w for the first w steps i
linear      1, then down to `end` over the last `decay` share of the run
cosine      end + (1 - end) (1 + cos πu) / 2, u from 0 to 1 in each of `cycles` equal parts after the warm-up
resampling  (i - r + 1) / w for the first w steps i from r on, when r steps were done at the last resampling
"""

from __future__ import annotations

import math

from xlc_ray.config.losses import Constant, Cosine, Linear, Schedule
from xlc_ray.config.training import Resample


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


def resampled_after(resample: Resample | None, step: int, steps: int) -> int:
    """Steps done at the newest resampling, when `step` of `steps` are done; 0 before the first."""
    if resample is None:
        return 0
    return min(step, math.floor(resample.until * steps), steps - 1) // resample.every * resample.every


def rewarmed(resample: Resample | None, step: int, steps: int) -> float:
    """The factor of the learning rate at step `step` (from 0) after resampling."""
    newest = resampled_after(resample, step, steps)
    return min(1.0, (step - newest + 1) / max(1, resample.warmup)) if resample and newest else 1.0
