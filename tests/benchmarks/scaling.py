"""How time and memory of the engine's step grow with features, layers, k, batch and tensor parallelism.

    python tests/benchmarks/scaling.py

One axis is walked at a time, the other arguments stay. In every round each point of the axis takes one step; a figure
is the median over rounds. Encoder work is tokens × features × width read, over all groups: what grows no faster than it
is bound by the encoder and by the optimizer. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import ranks, results, step, timing, variants
from xlc_ray.dictionary.shards import Shards
from xlc_ray.training import plan
from xlc_ray.training.learner import Learner

AXES = {
    "features": (8192, 16384, 32768),
    "layers": (2, 4, 8),
    "k": (16, 64, 256),
    "batch": (512, 1024, 2048),
    "tp": (1, 2),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: the point through which all axes go, and the points of each."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--axes", default=",".join(AXES), help="which to walk")
    for axis, points in AXES.items():
        p.add_argument(f"--{axis}-points", type=int, nargs="+", default=points, metavar="N")
    results.option(p)
    own, rest = p.parse_known_args(argv)
    own.axes = [axis for axis in AXES if axis in own.axes.split(",")]
    if not own.axes:
        p.error(f"--axes: some of {', '.join(AXES)}")
    start = ["--layers", "4", "--width", "256", "--features", "8192", "--batch", "1024", "--k", "64"]
    own.base = step.arguments([*start, *rest, "--variants", "engine"])
    return own


def run(own: argparse.Namespace) -> dict[str, Any]:
    """Axis → points with `seconds`, `tokens_per_s`, `peak_bytes`, `parameters`, and `growth`: the time for a unit of
    encoder work, relative to the first point's."""
    torch.set_num_threads(own.base.threads)
    found: dict[str, Any] = {"shape": {key: getattr(own.base, key) for key in step.SHAPE}, "axes": {}}
    for axis in own.axes:
        points = [argparse.Namespace(**vars(own.base) | {axis: n}) for n in getattr(own, f"{axis}_points")]
        seconds = _seconds(points, axis)
        rows = [_row(o, getattr(o, axis), s) for o, s in zip(points, seconds, strict=True)]
        for row in rows:
            row["growth"] = row["seconds"] / row["work"] * rows[0]["work"] / rows[0]["seconds"]
        found["axes"][axis] = rows
        gc.collect()
    return found


def _seconds(points: list[argparse.Namespace], axis: str) -> list[float]:
    steps: dict[str, timing.Step] = {}
    engines = []
    device = torch.device(points[0].device)
    for o in points:
        if axis == "tp" or o.tp > 1:
            engines.append(ranks.Engine(o, _dtype(o)))
            steps[str(getattr(o, axis))] = engines[-1].step
        else:
            steps[str(getattr(o, axis))] = _learner_step(o, device)
    timing.rounds(steps, o.warmup, device)
    found = timing.rounds(steps, o.repeats, device)
    for engine in engines:
        engine.close()
    return [statistics.median(found[str(getattr(o, axis))]) for o in points]


def _learner_step(o: argparse.Namespace, device: torch.device) -> timing.Step:
    config = variants.settings(o, _dtype(o))
    wires = variants.wiring_of(o, config)
    batches = variants.batches(wires, o.batch, 2, device)
    learner = Learner(variants.dictionary_of(config, wires, o, batches[0], Shards()), config)
    return lambda i: learner.train_step(batches[i % len(batches)], False)


def _dtype(o: argparse.Namespace) -> str:
    return "float32" if o.dtype == "auto" else o.dtype


def _row(o: argparse.Namespace, point: int, seconds: float) -> dict[str, Any]:
    config = variants.settings(o, _dtype(o))
    load = plan.work(config, variants.wiring_of(o, config), o.k)
    return {
        "point": point,
        "seconds": seconds,
        "tokens_per_s": o.batch / seconds,
        "parameters": load.parameters,
        "work": o.batch * load.flops["encode"],
        "peak_bytes": None if o.no_memory else step.peak_of(o, "engine", _dtype(o)),
    }


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [" ".join(f"{key}={value}" for key, value in found["shape"].items())]
    for axis, rows in found["axes"].items():
        lines += [
            "",
            f"{axis:<10}{'s/step':>9}{'tokens/s':>11}{'parameters':>12}{'peak GB':>9}   per unit of encoder work",
        ]
        for row in rows:
            peak = f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "-"
            lines.append(
                f"{row['point']:<10}{row['seconds']:>9.3f}{row['tokens_per_s']:>11,.0f}"
                f"{row['parameters'] / 1e6:>11.1f}M{peak:>9}   {row['growth']:.2f} x"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    own = arguments()
    found = run(own)
    results.deliver(found, table(found), own.json)


if __name__ == "__main__":
    main()
