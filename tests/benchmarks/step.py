"""One training step, three ways, side by side: naive, best dense, and the engine. variants.py says what they do.

    python tests/benchmarks/step.py --layers 12 --width 768 --features 6144 --batch 1024 --k 192

In every round each variant takes one step; a speedup is the median over rounds of the ratio within a round. Where not
all fit into memory together, they run one after another. Peak memory is that of a process that runs one variant alone.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import ranks, results, timing, variants
from xlc_ray.dictionary.shards import Shards
from xlc_ray.training import machine, plan
from xlc_ray.training.learner import Learner

NAMES = ("naive", "dense", "engine")
SHAPE = ("layers", "width", "features", "batch", "k", "gate", "wiring", "tp", "device", "threads")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=128, help="width of a site")
    p.add_argument("--features", type=int, default=1024, help="features of a group")
    p.add_argument("--batch", type=int, default=1024, help="tokens of a step")
    p.add_argument("--k", type=int, default=32, help="active features a token, over all groups")
    p.add_argument("--gate", choices=("batchtopk", "topk", "relu", "jumprelu"), default="batchtopk")
    p.add_argument("--wiring", choices=("clt", "sae", "transcoder", "crosscoder"), default="clt")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: what is faster here")
    p.add_argument("--tp", type=int, default=1, help="processes that the engine is split over")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--warmup", type=int, default=1)
    p.add_argument("--variants", default=",".join(NAMES), help="which to run")
    p.add_argument("--compile", action="store_true", help="torch.compile the dense variant")
    p.add_argument("--no-memory", action="store_true", help="start no processes to measure peak memory")
    results.option(p)
    o = p.parse_args(argv)
    o.variants = [name for name in NAMES if name in o.variants.split(",")]
    numbers = (o.layers, o.width, o.features, o.batch, o.k, o.tp, o.threads, o.repeats)
    if not o.variants or min(numbers) < 1 or o.warmup < 0:
        p.error(f"--variants: some of {', '.join(NAMES)}; numbers must be positive")
    return o


def run(o: argparse.Namespace) -> dict[str, Any]:
    """Everything that `--json` writes."""
    device = torch.device(o.device)
    torch.set_num_threads(o.threads)
    dtype = o.dtype if o.dtype != "auto" else machine.faster_dtype(device)
    config = variants.settings(o, dtype)
    wires = variants.wiring_of(o, config)
    work = plan.work(config, wires, o.k)
    alone = {} if o.no_memory else {name: peak_of(o, name, dtype) for name in o.variants}
    batches = variants.batches(wires, o.batch, 2, device)
    # `dense` trains the engine's tensors; gradients are freed between steps
    need = (
        work.parameters * (12 * len({name == "naive" for name in o.variants}) + 4 + 4 * ("naive" in o.variants)) + 2e9
    )
    together = len(o.variants) == 1 or need < timing.free_bytes(device)
    found: dict[str, Any] = {"losses": {}, "seconds": {}, "phases": {}, "peak": {}}
    for names in [o.variants] if together else [[name] for name in o.variants]:
        _measure(o, names, config, wires, batches, device, found)
        gc.collect()
    rates = machine.measure(device)  # last, so that peak memory is not that of measuring
    return _results(o, dtype, rates, work, together, found, alone)


def peak_of(o: argparse.Namespace, name: str, dtype: str) -> int:
    """Peak memory of a process that runs one variant, and nothing else, for a few steps."""
    words = [word for key in SHAPE for word in (f"--{key}", str(getattr(o, key)))]
    words += ["--dtype", dtype, "--variants", name, "--no-memory", "--repeats", "1"]
    return timing.peak_alone(words)["peak_bytes_of_process"]


def _measure(o, names: list[str], config, wires, batches: list, device: torch.device, found: dict) -> None:
    """Build some variants, compare their first losses, time their steps."""
    steps: dict[str, timing.Step] = {}
    learner = split = None
    dictionary = variants.dictionary_of(config, wires, o, batches[0], Shards())
    naive = variants.Naive(dictionary, config) if "naive" in names else None
    if "engine" in names and o.tp == 1:
        learner = Learner(dictionary, config)
    if "dense" in names:
        dense = variants.Dense(dictionary, config, learner and learner.optimizer, o.compile)
        steps["dense"] = lambda i: dense.step(batches[i % len(batches)])
        found["losses"]["dense"] = dense.loss_of(batches[0])
    del dictionary
    if learner is not None:
        steps["engine"] = lambda i: learner.train_step(batches[i % len(batches)], False)
        found["losses"]["engine"] = learner.train_step(batches[0], True)["loss"]
    elif "engine" in names:
        split = ranks.Engine(o, config.train.precision)
        steps["engine"] = split.step
        found["losses"]["engine"] = split.step(0, True)
    if naive is not None:
        steps["naive"] = lambda i: naive.step(batches[i % len(batches)])
        found["losses"]["naive"] = float(steps["naive"](0))
    timing.rounds(steps, o.warmup, device)
    found["seconds"] |= timing.rounds(steps, o.repeats, device)
    if learner is not None:
        found["phases"] = timing.phases(learner, steps["engine"], min(3, o.repeats), device)
    found["peak"][tuple(names)] = split.peak_bytes() if split else timing.peak_bytes(device)
    if split:
        split.close()


def _results(o, dtype: str, rates, work, together: bool, found: dict, alone: dict[str, int]) -> dict[str, Any]:
    seconds, main = found["seconds"], "engine" if "engine" in o.variants else o.variants[-1]
    median = {name: statistics.median(each) for name, each in seconds.items()}
    ideal = plan.roofline(work, rates, dtype, o.tp)
    report: dict[str, Any] = {
        "shape": {key: getattr(o, key) for key in SHAPE} | {"dtype": dtype},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": work.parameters,
        "interleaved": together,
        "repeats": o.repeats,
        "tokens_per_s": o.batch / median[main],
        "seconds": seconds,
        "first_loss": found["losses"],
        "variants": {name: {"seconds": s, "tokens_per_s": o.batch / s} for name, s in median.items()},
        "peak_bytes": alone.get(main),
        "peak_bytes_alone": alone,
        "peak_bytes_of_process": max(found["peak"].values()),
        "phases": found["phases"],
        "roofline": {"seconds": sum(ideal.values()), "phases": ideal},
        "roofline_share": sum(ideal.values()) / median[main],
        "machine": {"matmul": rates.matmul, "bandwidth": rates.bandwidth, "gather": rates.gather},
        "predicted_seconds": plan.predict(work, rates, dtype, o.tp, 1).seconds,
    }
    for other in ("naive", "dense"):
        if other in seconds and "engine" in seconds:
            spread = timing.ratio(seconds[other], seconds["engine"])
            report[f"speedup_over_{other}"] = spread["median"]
            report[f"speedup_over_{other}_spread"] = [spread["min"], spread["max"]]
    return report


def table(r: dict[str, Any]) -> str:
    """The results for people."""
    shape = " ".join(f"{key}={value}" for key, value in r["shape"].items())
    how = "interleaved" if r["interleaved"] else "one after another (they do not fit into memory together)"
    lines = [shape, f"{r['parameters'] / 1e6:.1f}M parameters; {r['repeats']} rounds, {how}", ""]
    lines.append(f"{'':<10}{'s/step':>9}{'tokens/s':>12}{'peak GB':>9}   engine is faster by")
    for name, v in r["variants"].items():
        peak = r["peak_bytes_alone"].get(name)
        line = f"{name:<10}{v['seconds']:>9.3f}{v['tokens_per_s']:>12,.0f}{f'{peak / 1e9:.2f}' if peak else '-':>9}"
        if f"speedup_over_{name}" in r:
            lo, hi = r[f"speedup_over_{name}_spread"]
            line += f"   {r[f'speedup_over_{name}']:.2f} x ({lo:.2f} to {hi:.2f})"
        lines.append(line)
    if r["phases"]:
        total = sum(r["phases"].values())
        lines += ["", "engine: " + ", ".join(f"{name} {s:.3f} s ({s / total:.0%})" for name, s in r["phases"].items())]
    m = r["machine"]
    lines.append(
        f"machine: {m['matmul']['float32'] / 1e9:,.0f} GFLOP/s float32, {m['matmul']['bfloat16'] / 1e9:,.0f} bfloat16, "
        f"{m['bandwidth'] / 1e9:.1f} GB/s copied, {m['gather'] / 1e9:.1f} GFLOP/s in sparse products"
    )
    lines.append(
        f"roofline {r['roofline']['seconds']:.3f} s: share reached {r['roofline_share']:.0%}; "
        f"plan.py predicts {r['predicted_seconds']:.3f} s"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    o = arguments()
    found = run(o)
    results.deliver(found, table(found), o.json)


if __name__ == "__main__":
    main()
