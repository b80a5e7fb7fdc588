"""Time and memory of steps: interleaved rounds, phases of the engine, peak memory of a process of its own."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from xlc_ray.training.learner import Learner
from xlc_ray.training.machine import wait

Step = Callable[[int], Any]
"""Takes the number of a batch."""


def timed(step: Step, i: int, device: torch.device) -> float:
    """Seconds of a step."""
    wait(device)
    started = time.perf_counter()
    step(i)
    wait(device)
    return time.perf_counter() - started


def rounds(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step; in every round each takes one, in turn, so that the machine's load meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats):
        for name, step in steps.items():
            found[name].append(timed(step, i, device))
    return found


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios round by round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


@contextmanager
def _clocked(owner: Any, name: str, phase: str, clock: dict[str, float], device: torch.device) -> Iterator[None]:
    """While open, calls of `owner.name` add their seconds to clock[phase]."""
    original, inherited = getattr(owner, name), name not in vars(owner)

    def measured(*args, **kwargs):
        wait(device)
        started = time.perf_counter()
        result = original(*args, **kwargs)
        wait(device)
        clock[phase] = clock.get(phase, 0.0) + time.perf_counter() - started
        return result

    setattr(owner, name, measured)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, original)


def phases(learner: Learner, step: Step, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of the engine's phases, in steps of their own; `other` is what is left."""
    places = [
        (learner.dictionary, "analyse", "encode_and_select"),
        (learner.dictionary, "decode_all", "decode"),
        (torch.Tensor, "backward", "backward"),
        (learner, "_finish_gradients", "gradient_norm"),
        (learner, "_update", "optimizer"),
    ]
    found = []
    for i in range(repeats):
        clock = {phase: 0.0 for _, _, phase in places}
        with ExitStack() as stack:
            for owner, name, phase in places:
                stack.enter_context(_clocked(owner, name, phase, clock, device))
            total = timed(step, i, device)
        found.append(clock | {"other": total - sum(clock.values())})
    return {phase: statistics.median(clock[phase] for clock in found) for phase in found[0]}


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process (on a GPU: torch in it) held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    # Unlike ru_maxrss this leaves out what the process was that started this one.
    own = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


def peak_alone(words: list[str]) -> dict[str, Any]:
    """What a process of its own reports that runs step.py with these arguments."""
    script = Path(__file__).with_name("step.py")
    done = subprocess.run([sys.executable, str(script), *words, "--json", "-"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])
