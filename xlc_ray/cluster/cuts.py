"""Which trials of a worker group are to leave it: Tune's schedulers stop whole groups only."""

from __future__ import annotations

from collections.abc import Iterable


class Cuts:
    """An actor that the driver tells and groups ask, between two steps of a group. Imports next to nothing."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """These leave."""
        self.names |= set(names)

    def forget(self, names: Iterable[str]) -> None:
        """These begin, whatever was before: trials of a population leave at each comparison, and come again."""
        self.names -= set(names)

    def among(self, names: Iterable[str]) -> list[str]:
        """Which of these leave."""
        return sorted(self.names & set(names))
