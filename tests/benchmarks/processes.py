"""CPU time of a job and of all processes below it, by what they are there for (Linux)."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
ROLES = {
    "RayTrainWorker": "training",
    "Trainable": "training",  # a trial of a sweep
    "Harvesting": "generating",
    "Generators": "live",
    "SplitCoordinator": "reading",
    "ray::Read": "reading",
    "ray::IDLE": "reading",  # a reader between two tasks
    "TrainController": "ray: controller",
    "dashboard": "ray: dashboard",
    "raylet": "ray: raylet",
    "gcs_server": "ray: gcs",
    "agent": "ray: agents",
    "jobs/train.py": "driver",
    "jobs/sweep.py": "driver",
}
"""Part of a command line → what the process does; the first that fits. All others are "ray: other"."""


def role(command: str) -> str:
    """What a process of this command line does."""
    return next((kind for part, kind in ROLES.items() if part in command), "ray: other")


def seconds() -> dict[int, tuple[int, str, float]]:
    """Of each process that there is: its parent, its command line, and the CPU seconds that it took."""
    found = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            # The second field is a name in parentheses, which may hold anything.
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        found[int(place.name)] = int(fields[1]), command, (int(fields[11]) + int(fields[12])) / TICK
    return found


class Watch:
    """Follows a process and all below it, from `start` to `stop`, in a thread."""

    def __init__(self, root: int):
        self.known, self.first, self.last = {root}, {}, {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """What was taken until now does not count."""
        self._look()
        self.first = {pid: taken for pid, (_, taken) in self.last.items()}
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """CPU seconds since `start`, by role."""
        self._over.set()
        self._thread.join()
        found: dict[str, float] = defaultdict(float)
        for pid, (kind, taken) in self.last.items():
            found[kind] += taken - self.first.get(pid, 0.0)
        return dict(found)

    def _follow(self) -> None:
        while not self._over.wait(0.2):
            self._look()
        self._look()

    def _look(self) -> None:
        now, grown = seconds(), True
        while grown:
            below = {pid for pid, (parent, *_) in now.items() if parent in self.known}
            grown = bool(below - self.known)
            self.known |= below
        for pid in self.known & now.keys():
            _, command, taken = now[pid]
            kind = role(command)
            # A reader that is idle now was one before; a worker's name says nothing before its first task.
            self.last[pid] = kind, taken
