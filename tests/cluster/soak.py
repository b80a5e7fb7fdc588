"""Train without pause for a while, and look whether memory grows: python -m tests.cluster.soak --minutes 60

Two ranks of a tiny run, on stored activations, with a line of metrics and a checkpoint every few steps, which does as
often in an hour what a real run does in weeks. Samples are what the ranks publish as `ray_xlc_memory_bytes`, and the
driver's own memory. The first third is warm-up; of what is left, the medians of the first and the last quarter are
compared. Exit status 1 where a process grew by more than --allowed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray

from tests.cluster.endpoint import scraped
from tests.runs import small_run_in
from xlc_ray.cluster.gauges import resident_bytes
from xlc_ray.cluster.train import train
from xlc_ray.training import logs

SAMPLE_SECONDS = 1.0
WARM_UP = 1 / 3


def soak(minutes: float) -> dict:
    """Train for so many minutes after the first step. Returns, in MB, what each process had then and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "train.steps": 2_000_000,  # more than an hour makes
            "train.log_every": 10,
            "train.checkpoint_every": 50,
            "cluster.tensor_parallel": 2,
        }
        config = small_run_in(Path(folder))(changes)
        ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
        samples: dict[str, list[float]] = {}
        watch = threading.Thread(target=_sample, args=(config.out, 60 * minutes, samples), daemon=True)
        watch.start()
        try:
            train(config)
        except KeyboardInterrupt:
            watch.join()
        last = logs.last(config.out)
        ray.shutdown()
    assert last, "a run writes metrics"
    return {"minutes": minutes, "steps": last["step"], "memory": {who: _growth(mb) for who, mb in samples.items()}}


def _sample(out: str, seconds: float, samples: dict[str, list[float]]) -> None:
    """Sample until the time is over, then interrupt the run as Ctrl-C would."""
    try:
        port = ray.nodes()[0]["MetricsExportPort"]
        while not logs.last(out):
            time.sleep(SAMPLE_SECONDS)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            published = scraped(port, "run").items()
            found = {f"rank {rank}": value for (name, rank), (value, _) in published if name == "memory_bytes"}
            for who, value in (found | {"driver": resident_bytes()}).items():
                samples.setdefault(who, []).append(value / 1e6)
            time.sleep(SAMPLE_SECONDS)
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def _growth(mb: list[float]) -> dict[str, float]:
    warm = mb[int(len(mb) * WARM_UP) :]
    quarter = max(1, len(warm) // 4)
    first, last = statistics.median(warm[:quarter]), statistics.median(warm[-quarter:])
    return {"after_warm_up": round(first, 1), "at_the_end": round(last, 1), "growth": round(last - first, 1)}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--allowed", type=float, default=10.0, help="MB that a process may grow by")
    chosen = options.parse_args()
    found = soak(chosen.minutes)
    print(json.dumps(found, indent=1))
    grown = [who for who, mb in found["memory"].items() if mb["growth"] > chosen.allowed]
    print(f"grew by more than {chosen.allowed:g} MB: {', '.join(grown)}" if grown else "memory did not grow")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
