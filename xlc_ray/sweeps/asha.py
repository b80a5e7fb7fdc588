"""Asynchronous successive halving (Li et al. 2018), in the form that stops: no trial waits for another.

A trial that comes to a rung as the n-th goes on if fewer than n / reduction of the trials that came there so far score
better. So the first goes on always, and of many the best 1/reduction. By excess (frontier.py) none is better than a
trial on the frontier, so that the whole frontier goes on, however many that are.
"""

from __future__ import annotations

from collections.abc import Mapping

from xlc_ray.config.sweep import Asha
from xlc_ray.sweeps.frontier import Metrics, scores


def rungs(settings: Asha | None, last: int) -> tuple[int, ...]:
    """The rungs of a run of `last` steps, all below that."""
    if settings is None or settings.rungs:
        return tuple(rung for rung in (settings.rungs or () if settings else ()) if rung < last)
    found, rung = [], float(settings.grace)
    while round(rung) < last:
        found.append(round(rung))
        rung *= settings.reduction
    return tuple(dict.fromkeys(found))


class Halving:
    """What trials measured at each rung, and who goes on."""

    def __init__(self, rungs: tuple[int, ...], reduction: float, metric: str):
        self.rungs, self.reduction, self.metric = rungs, reduction, metric
        self.measured: dict[int, dict[str, Metrics]] = {rung: {} for rung in rungs}
        self.decided: dict[tuple[int, str], bool] = {}

    def goes_on(self, trial: str, step: int, metrics: Metrics) -> bool:
        """Whether a trial that has come to `step` trains on. A trial that comes again, after a restart, is told what it
        was told before."""
        if step not in self.measured:
            return True
        if (step, trial) not in self.decided:
            here = self.measured[step]
            here[trial] = metrics
            mine = (found := scores(self.metric, here))[trial]
            better = sum(score < mine for score in found.values())
            self.decided[step, trial] = better < len(here) / self.reduction
        return self.decided[step, trial]

    def remember(self, trial: str, measured: Mapping[int, Metrics], cut: bool) -> None:
        """Take over what a trial of an earlier session measured; `cut`: it was stopped at the last of these steps."""
        for step, metrics in measured.items():
            if step in self.measured:
                self.measured[step][trial] = metrics
                self.decided[step, trial] = not (cut and step == max(measured))
