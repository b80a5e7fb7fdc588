"""Freed memory, kept for the next step.

A training step frees its gradients, and the next one asks for as much again. The C library of Linux hands large blocks
back to the kernel at once, so that every step would fault the same gigabytes in page by page, which takes longer than to
compute what they hold. (On GPUs torch keeps freed memory by itself.)
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have this process reuse what it frees instead of returning it to the kernel; False where malloc cannot be told."""
    if not sys.platform.startswith("linux"):
        return False
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    return tell is not None and bool(tell(_MMAP_MAX, 0) and tell(_TRIM_THRESHOLD, -1))
