"""What trials that share one pass of the language model save: jobs/sweep.py on a live source, shared and independent.

    python tests/benchmarks/live_sweep.py --trials 4 --steps 64

Both sweeps train the same dictionaries (as many sparsities of one) of the same text and store nothing of it but the
held-out part and the sample, which are made before. It counts chunks made (passes of the language model), CPU seconds
of all processes by what they are there for, and seconds of the whole job, Ray's start included; and it compares the
parameters. Independent trials run at once as the machine has CPUs.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import processes, results
from xlc_ray.config import Config, load_config, yaml_text
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.sweeps.result import Sweep

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 2048
MADE = re.compile(r"^live +([\d,]+) chunks made by language models, ([\d,]+) read$", re.MULTILINE)


def base_of(o: argparse.Namespace, folder: str) -> Config:
    """What all trials have in common; the text suffices for one epoch."""
    changes: dict[str, Any] = {
        "out": f"{folder}/base",
        "generate.tokens": o.steps * o.batch,
        "generate.held_out_tokens": CHUNK,
        "generate.chunk_tokens": CHUNK,
        "source": {
            "kind": "live",
            "path": f"{folder}/store",
            "sample_tokens": CHUNK,
            "verify": False,
            "window_slices": 64,
        },
        "dictionary.wiring": {"kind": o.wiring},
        "dictionary.features": o.features,
        "train.steps": o.steps,
        "train.batch_tokens": o.batch,
        "train.checkpoint_every": o.steps,
        "evaluate.tokens": CHUNK,
        "cluster": {"model_actors": 1},
    }
    return load_config(o.config, changes)


def job(name: str, *words: str) -> tuple[str, float, dict[str, float]]:
    """What a job said, seconds that it took, and CPU seconds of its processes by role."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "jobs" / name), *words]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        watch = processes.Watch(running.pid)
        watch.start()
        said, _ = running.communicate()
        taken = watch.stop()
    if running.returncode:
        raise SystemExit(f"jobs/{name}: exit status {running.returncode}")
    return said, time.perf_counter() - began, taken


def one(folder: str, base: Config, trials: int, shared: bool) -> dict[str, Any]:
    """A sweep: chunks `made` and `read`, `seconds`, `cpu` by role."""
    out = f"{folder}/{'shared' if shared else 'alone'}"
    gates = [{"kind": "topk", "k": 8 * (n + 1)} for n in range(trials)]
    tree = {"base": base.model_dump(mode="json"), "space": {"dictionary.gate": {"choice": gates}}, "out": out}
    Path(f"{out}.yaml").write_text(yaml_text.dump(tree | {"share_activations": shared}))
    said, seconds, cpu = job("sweep.py", "--config", f"{out}.yaml")
    (found,) = MADE.findall(said)
    made, read = (int(number.replace(",", "")) for number in found)
    return {"made": made, "read": read, "seconds": seconds, "cpu": cpu}


def equal(folder: str) -> bool:
    """Whether sharing changed no bit of any parameter."""
    runs = zip(*(Sweep(f"{folder}/{how}").frame()["out"] for how in ("alone", "shared")), strict=True)
    states = [[load_dictionary(run)[0].state_dict() for run in pair] for pair in runs]
    return all(torch.equal(first[name], second[name]) for first, second in states for name in first)


def run(o: argparse.Namespace) -> dict[str, Any]:
    """Both sweeps, and whether their parameters are the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        base = base_of(o, folder)
        Path(f"{folder}/base.yaml").write_text(base.yaml())
        job("generate.py", "--config", f"{folder}/base.yaml")
        found = {how: one(folder, base, o.trials, shared=how == "shared") for how in ("alone", "shared")}
        return found | {
            "equal_bits": equal(folder),
            "trials": o.trials,
            "steps": o.steps,
            "batch": o.batch,
            "load": os.getloadavg()[0],
        }


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    roles = sorted({role for how in ("alone", "shared") for role in found[how]["cpu"]})
    lines = [f"{found['trials']} trials, {found['steps']} steps of {found['batch']} tokens    alone   shared"]
    rows = [(name, *(found[how][name] for how in ("alone", "shared"))) for name in ("made", "read", "seconds")]
    rows += [("CPU s", *(sum(found[how]["cpu"].values()) for how in ("alone", "shared")))]
    rows += [(f"  {role}", *(found[how]["cpu"].get(role, 0.0) for how in ("alone", "shared"))) for role in roles]
    lines += [f"{name:<24}{alone:>12,.1f}{shared:>12,.1f}" for name, alone, shared in rows]
    lines.append("the same bits" if found["equal_bits"] else "DIFFERENT bits")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    p.add_argument("--wiring", default="transcoder")
    p.add_argument("--features", type=int, default=256)
    p.add_argument("--batch", type=int, default=1024)
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--trials", type=int, default=4)
    results.option(p)
    o = p.parse_args()
    found = run(o)
    results.deliver(found, table(found), o.json)


if __name__ == "__main__":
    main()
