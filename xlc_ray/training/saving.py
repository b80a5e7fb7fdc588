"""When a run's checkpoints are written, and when others hear of them: once every rank knows that one is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xlc_ray import files
from xlc_ray.dictionary import checkpoint
from xlc_ray.training.learner import Learner

Saved = Callable[[int, dict[str, Any]], None]
"""Called with the step of a complete checkpoint, and the newest metrics when it was taken."""


class Stop(Exception):
    """Raised by `saved`, on every rank: training ends here, with a checkpoint of where it is."""


REQUEST = "stop"
"""A file in a run's directory by which another process asks for that."""


def asked_to_stop(run_dir: str) -> bool:
    """Whether somebody has, since this was last called."""
    path = files.join(run_dir, REQUEST)
    asked = files.exists(path)
    if asked:
        files.remove(path)
    return asked


class Saving:
    """The checkpoints of one rank's run. A context manager, which ends after what is being written."""

    def __init__(self, learner: Learner, saved: Saved):
        self._learner, self._saved = learner, saved
        self._background = checkpoint.Background() if learner.config.train.async_checkpoints else None
        self._untold: tuple[int, dict[str, Any]] | None = None

    def save(self, metrics: dict[str, Any]) -> None:
        """A checkpoint of this step, after the one before. Raises Stop, after it is complete, where `saved` did."""
        try:
            self.finish()
        except Stop:
            self._learner.save(self._learner.config.out)
            raise
        self._learner.save(self._learner.config.out, self._background)
        self._untold = self._learner.step, metrics
        if self._background is None:
            self.finish()

    def check(self) -> None:
        """Raise what made a write fail, if it did. Does not wait."""
        if self._background is not None:
            self._background.check()

    def finish(self) -> None:
        """Wait for what is being written, and tell of it: on every rank at the same step, since `saved` may be a
        meeting of ranks (Ray Train's report is)."""
        if self._background is not None:
            self._background.wait()
        if self._untold is not None:
            told, self._untold = self._untold, None
            self._saved(*told)

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._background is not None:
            self._background.__exit__(*error)
