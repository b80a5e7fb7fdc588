"""A rank that makes no step for too long writes the stack of each of its threads and ends its process.

A hang is most often a rank that waits for another in a collective, in C++. So a thread of its own watches. It writes
`{out}/stacks/{attempt}/rank_N.txt`; GRACE seconds later, when the other ranks have done so too, a timer of Python's
faulthandler ends the process, even where the interpreter's lock is never released (then with a stack in the worker's
stderr, in Ray's logs). A process that was stopped from outside does none of this: Ray Train's health check finds it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from types import FrameType

from xlc_ray import files

GRACE = 5.0
"""Seconds between the stack of the first rank and the end of its process."""
START = 180.0
"""Seconds that a rank has for its first step at least: readers start before it, on a machine that may be busy."""
OURS = f"{os.sep}xlc_ray{os.sep}"


class Watchdog:
    """Watches the thread that enters it. `step` counts the steps it says it has made."""

    def __init__(self, timeout: float, path: str, rank: int) -> None:
        self.timeout, self.path, self.rank = timeout, path, rank
        self.step = 0
        self._allowed = max(timeout, START)
        self._last = time.monotonic()
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """A step was made."""
        self.step, self._last = step, time.monotonic()
        if self._allowed != self.timeout:  # the first
            self._allowed = self.timeout
            self._arm(self._allowed)

    def __enter__(self) -> Watchdog:
        self._arm(self._allowed)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, left: float) -> None:
        # File 2: Ray replaces sys.stderr, and the timer needs a descriptor.
        faulthandler.dump_traceback_later(left + GRACE, exit=True, file=2)

    def _watch(self) -> None:
        told = False
        while not self._over.wait(min(1.0, self.timeout / 10)):
            left = self._last + self._allowed - time.monotonic()
            if left > 0:
                self._arm(left)
                told = False
            elif not told:
                told = True
                files.write_bytes(files.join(self.path, f"rank_{self.rank}.txt"), self.stacks().encode())

    def stacks(self) -> str:
        """A line that says where the watched thread is, then the stack of each thread, innermost frame last."""
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        quiet = time.monotonic() - self._last
        lines = [
            f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()}): nothing for {quiet:.0f} s after step "
            f"{self.step}, in {_where(frames.get(self._watched))}\n"
        ]
        for ident in sorted(frames, key=lambda ident: ident != self._watched):
            lines += [f"\nthread {names.get(ident, ident)}\n", *traceback.format_stack(frames[ident])]
        return "".join(lines)


def _where(frame: FrameType | None) -> str:
    """The innermost frame of ours, else the innermost."""
    if frame is None:
        return "a thread that ended"
    found = traceback.extract_stack(frame)
    last = next((f for f in reversed(found) if OURS in f.filename), found[-1])
    return f"{last.name} ({os.path.basename(last.filename)}:{last.lineno})"


def first_lines(path: str) -> list[str]:
    """What the ranks of an attempt that hung said, one line each; empty where none did."""
    names = [name for name in files.listdir(path) if name.startswith("rank_")]
    ranks = sorted(names, key=lambda name: int(name.removeprefix("rank_").removesuffix(".txt")))
    return [files.read_bytes(files.join(path, name)).decode().splitlines()[0] for name in ranks]
