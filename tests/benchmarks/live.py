"""What live training costs beside its parts: the language model alone, and training alone on what it made.

    python tests/benchmarks/live.py --config configs/quickstart.yaml

Where model and trainer have cores of their own, a run is as fast as the slower of them, less what live training adds.
On a machine whose cores they share, speed would tell of the sharing; CPU time tells of what is added. So

    live_share = (model alone + training alone) / all processes of a live run, in CPU seconds a token

where training alone reads a stored dataset in its own process, on one thread like the workers, and of the job every
process counts, Ray's too, between two lines of metrics in the middle: at both as many chunks are made ahead.
`slower_share` compares stage with stage, as with cores of their own: the slower alone, the slower in the job.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import processes, results
from xlc_ray.activations.store import open_store
from xlc_ray.cluster.generate import Harvester
from xlc_ray.cluster.session import resolve
from xlc_ray.config import Config, load_config
from xlc_ray.training import logs, train_alone

ROOT = Path(__file__).resolve().parents[2]
CHUNK, BATCH, EVERY, HELD, SLICES = 2048, 1024, 5, 12, 64
WARM = 10
"""Steps, and chunks, that do not count."""
STEPS = 400


def settings(path: str, folder: str, steps: int) -> Config:
    """One rank, one language model, of the shape of a file's dictionary and model; the text suffices for the steps."""
    changes = {
        "out": f"{folder}/run",
        "generate.tokens": steps * BATCH,
        "generate.held_out_tokens": CHUNK,
        "generate.chunk_tokens": CHUNK,
        "source": {"kind": "store", "path": f"{folder}/store", "verify": False, "window_slices": SLICES},
        "train.steps": steps,
        "train.batch_tokens": BATCH,
        "train.log_every": EVERY,
        "cluster": {"model_actors": 1},
    }
    return load_config(path, changes)


def job(name: str, config: Config) -> subprocess.Popen[bytes]:
    """A job of the repository on these settings."""
    file = Path(config.out + ".yaml")
    file.write_text(config.yaml())
    return subprocess.Popen([sys.executable, str(ROOT / "jobs" / name), "--config", str(file)], cwd=ROOT)


def generate(config: Config) -> None:
    """jobs/generate.py: of a live source only the sample."""
    with job("generate.py", config) as running:
        pass
    if running.returncode:
        raise SystemExit(f"jobs/generate.py: exit status {running.returncode}")


def model_alone(config: Config) -> float:
    """CPU seconds a token of making chunks."""
    sites = list(open_store(config.source.path).manifest.sites)
    harvester = Harvester(config, sites, {False: config.source.path})
    harvester.load()
    torch.set_num_threads(1)
    harvester.make(False, 0)
    began, tokens = time.process_time(), 0
    for index in range(1, 1 + WARM):
        tokens += len(next(iter(harvester.make(False, index).values())))
    return (time.process_time() - began) / tokens


def training_alone(config: Config) -> float:
    """CPU seconds a token of training in this process."""
    torch.set_num_threads(1)
    seen: dict[int, float] = {}
    train_alone(config, lambda metrics: seen.update({metrics["step"]: time.process_time()}))
    steps = [step for step in sorted(seen) if step >= WARM]
    return (seen[steps[-1]] - seen[steps[0]]) / ((steps[-1] - steps[0]) * config.train.batch_tokens)


def live(config: Config) -> dict[str, float]:
    """CPU seconds a token of each role in a live run, between two lines in its middle."""
    # A small sample, so that the language model is there before the first line, and does not start between the two.
    source = {"kind": "live", "path": config.source.path + "_live", "held_chunks": HELD, "window_slices": SLICES}
    source |= {"sample_tokens": CHUNK}
    config = config.override({"source": source})
    generate(config)
    end = config.train.steps - HELD * CHUNK // BATCH - EVERY
    with job("train.py", config) as running:
        first = _line(running, config.out, WARM)
        watch = processes.Watch(running.pid)
        watch.start()
        last = _line(running, config.out, end)
        taken = watch.stop()
    if running.returncode:
        raise SystemExit(f"jobs/train.py: exit status {running.returncode}")
    return {role: spent / ((last - first) * BATCH) for role, spent in sorted(taken.items())}


def _line(running: subprocess.Popen[bytes], out: str, step: int) -> int:
    """The newest step, once it is as far as `step`."""
    while running.poll() is None:
        if (lines := logs.read(out)) and lines[-1]["step"] >= step:
            return lines[-1]["step"]
        time.sleep(0.02)
    raise SystemExit(f"jobs/train.py ended before step {step}: exit status {running.returncode}")


def run(path: str, steps: int) -> dict[str, Any]:
    """`live_share`, `slower_share`, and the CPU seconds a million tokens behind them."""
    if steps * BATCH < 4 * HELD * CHUNK:
        raise SystemExit(f"--steps {steps}: too few to have a middle; allowed: at least {4 * HELD * CHUNK // BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        config = resolve(settings(path, folder, steps))
        generate(config)
        model = model_alone(config)
        training = training_alone(config.override({"out": f"{folder}/alone"}))
        roles = live(config)
    return {
        "live_share": (model + training) / sum(roles.values()),
        "slower_share": max(model, training) / max(roles["generating"], roles["training"]),
        "model_alone_s": model * 1e6,
        "training_alone_s": training * 1e6,
        "live_s": {role: spent * 1e6 for role, spent in roles.items()},
        "steps": steps,
        "load": os.getloadavg()[0],
    }


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "CPU seconds a million tokens",
        f"  language model alone {found['model_alone_s']:8.1f}",
        f"  training alone       {found['training_alone_s']:8.1f}",
        *(f"  live: {role:<14} {spent:8.1f}" for role, spent in found["live_s"].items()),
        f"live share {found['live_share']:.0%}; of the slower stage {found['slower_share']:.0%}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    p.add_argument("--steps", type=int, default=STEPS)
    results.option(p)
    o = p.parse_args()
    found = run(o.config, o.steps)
    results.deliver(found, table(found), o.json)


if __name__ == "__main__":
    main()
