"""One tidy line of progress a stage: redrawn in place on a terminal, a plain line every few seconds elsewhere.

generate   12/25 chunks   196,608 tokens   31,200 tok/s   0:06 left
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

REDRAW_SECONDS = 0.5
PLAIN_SECONDS = 5.0
RATE_SECONDS = 20.0
"""Speed is that of the last so many seconds, so that start-up and pauses do not spoil the estimate for ever."""


class Progress:
    """Counts `done` of `total` pieces (`noun`) and the tokens in them; both start above 0 in a resumed run."""

    def __init__(
        self,
        label: str,
        noun: str,
        total: int | None,
        done: int = 0,
        tokens: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._noun, self._total = label, noun, total
        self._stream, self._clock = stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._history = deque([(clock(), done, tokens)])
        self._shown_at, self._line = clock(), ""
        self._pending, self._updates = False, 0

    def update(self, done: int, tokens: int, *extras: str) -> None:
        """State what is done by now, not what was added; `extras` ("loss 0.31") stand before the time left."""
        now = self._clock()
        self._history.append((now, done, tokens))
        self._updates += 1
        if self._updates == 2:
            self._history.popleft()  # up to the first piece it was start-up, which says nothing of what is left
        while len(self._history) > 2 and self._history[1][0] < now - RATE_SECONDS:
            self._history.popleft()
        self._line = self._format(extras)
        self._pending = True
        if now - self._shown_at >= (REDRAW_SECONDS if self._terminal else PLAIN_SECONDS):
            self._show(now)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state and leave the cursor on a fresh line."""
        if self._pending:
            self._show(self._clock())
        if self._terminal and self._line:
            self._stream.write("\n")
            self._stream.flush()

    def _show(self, now: float) -> None:
        self._stream.write(f"\r{self._line}\x1b[K" if self._terminal else f"{self._line}\n")
        self._stream.flush()
        self._shown_at, self._pending = now, False

    def _format(self, extras: tuple[str, ...]) -> str:
        (then, done_then, tokens_then), (now, done, tokens) = self._history[0], self._history[-1]
        seconds = now - then
        count = f"{done:,}" if self._total is None else f"{done:,}/{self._total:,}"
        parts = [f"{self._label:<10s}{count} {self._noun}", f"{tokens:,} tokens"]
        if seconds > 0 and tokens > tokens_then:
            parts.append(f"{(tokens - tokens_then) / seconds:,.0f} tok/s")
        parts.extend(extras)
        if self._total is not None and self._updates > 1 and seconds > 0 and done_then < done < self._total:
            parts.append(f"{duration((self._total - done) * seconds / (done - done_then))} left")
        return "   ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes as kB, MB, GB, TB (powers of 1000)."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
