"""The speed of jobs/train.py, read from what it logs, against the bare step on tensors in memory.

    python tests/benchmarks/end_to_end.py --config configs/quickstart.yaml

The job reads a stored dataset (which jobs/generate.py makes first if there is none), with Ray, its data pipeline and
its logs; the bare step is the same learner in the same number of processes, fed with synthetic activations. It is
measured before and after the job. The job's first line of metrics, which pays for starting, does not count.

From that line on the CPU time of all of the job's processes is counted too. On a machine whose cores are all busy
training, what others take is time lost: `feeding` is the share of time that training waits for data plus the readers'
share of the cores, `ray` the share of the cores that Ray's own processes and the driver take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import processes, ranks, results, step, timing
from xlc_ray.activations.store import open_store
from xlc_ray.config import Config, load_config
from xlc_ray.dictionary.sparse import BREAK_EVEN
from xlc_ray.training import logs
from xlc_ray.training.loop import wiring_for

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))


def command(name: str, config: str, *words: str) -> list[str]:
    """A job of the repository."""
    return [sys.executable, str(ROOT / "jobs" / name), "--config", config, *words]


def train(path: str, out: str) -> tuple[list[dict[str, Any]], dict[str, float], float]:
    """Run jobs/train.py: the lines of metrics after the first, CPU seconds by role since then, and the seconds."""
    with subprocess.Popen(command("train.py", path, f"--out={out}"), cwd=ROOT) as running:
        while not logs.read(out) and running.poll() is None:
            time.sleep(0.05)
        watch, began = processes.Watch(running.pid), time.perf_counter()
        watch.start()
        last = load_config(path).train.steps
        while running.poll() is None and logs.read(out)[-1]["step"] < last:
            time.sleep(0.05)
        taken, passed = watch.stop(), time.perf_counter() - began
    if running.returncode:
        raise SystemExit(f"jobs/train.py: exit status {running.returncode}")
    return logs.read(out)[1:], taken, passed


def bare(config: Config, repeats: int) -> list[float]:
    """Seconds of bare steps on this configuration's shape."""
    wiring = wiring_for(config, open_store(config.source.path))
    d, gate = config.dictionary, config.dictionary.gate
    k = getattr(gate, "k", int(BREAK_EVEN * d.features * wiring.groups / 2))
    layers, width = len(wiring.read_sites), next(iter(wiring.widths.values()))
    numbers = {"layers": layers, "width": width, "features": d.features, "batch": config.train.batch_tokens, "k": k}
    numbers["tp"] = config.cluster.tensor_parallel
    words = [word for name, n in numbers.items() for word in (f"--{name}", str(n))]
    o = step.arguments([*words, "--gate", gate.kind, "--wiring", d.wiring.kind, "--device", "cpu"])
    engine = ranks.Engine(o, config.train.precision)
    steps: dict[str, timing.Step] = {"engine": engine.step}
    timing.rounds(steps, 5, torch.device("cpu"))
    found = timing.rounds(steps, repeats, torch.device("cpu"))["engine"]
    engine.close()
    return found


def run(path: str, repeats: int) -> dict[str, Any]:
    """`bare_tokens_per_s`, `job_tokens_per_s`, their ratio `job_share_of_bare`, and the job's `data_wait` share."""
    config = load_config(path)
    if config.cluster.replicas != 1:
        raise SystemExit("cluster.replicas: the bare step is that of one replica; allowed: 1")
    if not Path(config.source.path, "manifest.json").exists():
        subprocess.run(command("generate.py", path), check=True, cwd=ROOT)
    seconds = bare(config, repeats)
    with tempfile.TemporaryDirectory() as folder:
        lines, taken, passed = train(path, f"{folder}/run")
    seconds += bare(config, repeats)
    alone = config.train.batch_tokens / statistics.median(seconds)
    within = statistics.median(line["tokens_per_s"] for line in lines)
    waited = statistics.median(line["data_wait"] for line in lines)
    cores = {role: spent / passed for role, spent in sorted(taken.items())}
    others = sum(n for role, n in cores.items() if role not in ("training", "reading"))
    return {
        "bare_tokens_per_s": alone,
        "job_tokens_per_s": within,
        "job_share_of_bare": within / alone,
        "data_wait": waited,
        "cores": cores,
        "feeding": waited + cores.get("reading", 0.0) / CORES,
        "ray": others / CORES,
    }


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"bare step     {found['bare_tokens_per_s']:>10,.0f} tokens/s",
        f"jobs/train.py {found['job_tokens_per_s']:>10,.0f} tokens/s: {found['job_share_of_bare']:.0%} of it",
        f"feeding  {found['feeding']:.1%}, of which waiting for data {found['data_wait']:.1%}; Ray {found['ray']:.1%}",
        "cores    " + ", ".join(f"{role} {n:.2f}" for role, n in found["cores"].items()),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    p.add_argument("--repeats", type=int, default=20)
    results.option(p)
    o = p.parse_args()
    found = run(o.config, o.repeats)
    results.deliver(found, table(found), o.json)


if __name__ == "__main__":
    main()
