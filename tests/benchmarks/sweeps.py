"""What sweeps save: trials on one stream against the same trials alone, and halving against the full grid.

    python tests/benchmarks/sweeps.py shared --json found.json
    python tests/benchmarks/sweeps.py asha --json found.json

`shared` trains the same dictionaries (as many sparsities of one) in this process, in one thread: each from a stream of
its own, then all from one; from a store, and from passes of the language model whose activations nobody keeps. Rounds
alternate. It counts rows and bytes read and tokens that the language model reads, and compares the parameters.

`asha` runs jobs/sweep.py twice, as it stands and with all trials to the end (`--asha=null`); sweeps that are already in
`--folder` are kept. A fvu is compared with what the full grid's frontier reaches at the same l0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import results
from xlc_ray import files
from xlc_ray.activations import source
from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.activations.store import Store, fresh, open_source
from xlc_ray.config import Config, load_config
from xlc_ray.dictionary import Shards, Wiring
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.sweeps.frontier import frontier, interpolate, log
from xlc_ray.sweeps.result import Sweep
from xlc_ray.training import loop
from xlc_ray.training.together import Run, Together

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Counted:
    """What a round read."""

    rows: int = 0
    bytes: int = 0
    model_tokens: int = 0


class CountingStore(Store):
    """A store that says what was read from it."""

    counted = Counted()

    def gather(self, chunk, row, sites, arrays=fresh):
        found = super().gather(chunk, row, sites, arrays)
        self.counted.rows += len(row)
        self.counted.bytes += sum(values.nbytes for values in found.values())
        return found


def from_model(config: Config, data: Store, model: LanguageModel, counted: Counted) -> loop.Reader:
    """A reader that runs the language model on the store's text, and keeps nothing."""

    def read(wiring: Wiring, first: int, memory: source.Memory) -> Iterator[Mapping[str, torch.Tensor]]:
        def blocks():
            for chunk in itertools.cycle(range(len(data.manifest.chunks))):
                text = data.windows(chunk)
                assert text is not None, "a store of ours"
                counted.model_tokens += int(text.windows.length.sum())
                yield harvest_chunk(model, text, wiring.sites, config.generate.batch_windows, data.dtype)

        assert first == 0, "from the start"
        return source.rebatch(blocks(), config.train.batch_tokens, data.dtype, memory.batch)

    return read


def configs_of(o: argparse.Namespace, folder: str) -> list[Config]:
    """The settings of each trial: one dictionary at so many sparsities."""
    base: dict[str, Any] = {
        "cluster.tensor_parallel": 1,
        "dictionary.wiring": {"kind": o.wiring},
        "dictionary.features": o.features,
        "train.steps": o.steps,
        "train.batch_tokens": o.batch,
        "train.checkpoint_every": o.steps,
        "train.log_every": o.steps,
    }
    gates = [{"kind": "topk", "k": 8 * (n + 1)} for n in range(o.trials)]
    return [load_config(o.config, base | {"dictionary.gate": g, "out": f"{folder}/{n}"}) for n, g in enumerate(gates)]


def train(configs: list[Config], data: Store, reader: loop.Reader) -> None:
    """Train these on one stream."""
    for config in configs:
        loop.prepare(config)
    group = Together({c.out: Run(c) for c in configs}, data, Shards(), reader, torch.device("cpu"))
    while group.names:
        group.advance()


def round_of(
    o: argparse.Namespace, kind: str, data: CountingStore, model: LanguageModel, folder: str
) -> dict[str, Any]:
    """Each alone, then all together: seconds, and what was read."""
    found: dict[str, Any] = {}
    for how in ("alone", "shared"):
        configs = configs_of(o, f"{folder}/{kind}/{how}")
        counted = CountingStore.counted = Counted()
        began = time.perf_counter()
        for group in [configs] if how == "shared" else [[config] for config in configs]:
            own = from_model(group[0], data, model, counted)
            train(group, data, own if kind == "model" else loop.in_process(group[0], data, Shards()))
        found[how] = {"seconds": time.perf_counter() - began} | vars(counted)
    return found


def equal(o: argparse.Namespace, folder: str) -> bool:
    """Whether sharing changed no bit of any parameter."""
    pairs = zip(configs_of(o, f"{folder}/alone"), configs_of(o, f"{folder}/shared"), strict=True)
    states = [[load_dictionary(config.out)[0].state_dict() for config in pair] for pair in pairs]
    return all(torch.equal(one[name], other[name]) for one, other in states for name in one)


def shared(o: argparse.Namespace) -> dict[str, Any]:
    """For store and model: medians of both ways, what each read, the ratio of their speeds, and whether bits differ."""
    torch.set_num_threads(1)
    settings = configs_of(o, "nowhere")[0]
    opened = open_source(settings.source)
    data, model = CountingStore(opened.path, opened.manifest), LanguageModel(settings.model)
    found: dict[str, Any] = {}
    for kind in ("store", "model"):
        rounds = []
        for _ in range(o.repeats + 1):  # the first one warms up
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(round_of(o, kind, data, model, folder))
                same = equal(o, f"{folder}/{kind}")
        rounds = rounds[1:]
        ratios = [each["alone"]["seconds"] / each["shared"]["seconds"] for each in rounds]
        found[kind] = {"speedup": statistics.median(ratios), "speedups": ratios, "equal_bits": same}
        for how in ("alone", "shared"):
            seconds = statistics.median(each[how]["seconds"] for each in rounds)
            tokens = o.trials * o.steps * o.batch
            found[kind][how] = rounds[0][how] | {"seconds": seconds, "tokens_per_s": tokens / seconds}
    return found | {"trials": o.trials, "steps": o.steps, "batch": o.batch, "features": o.features, "wiring": o.wiring}


def shared_table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [f"{'':<14}{'seconds':>9}{'tokens/s':>11}{'rows read':>12}{'MB read':>10}{'model tokens':>14}"]
    for kind in ("store", "model"):
        for how in ("alone", "shared"):
            row = found[kind][how]
            lines.append(
                f"{kind + ', ' + how:<14}{row['seconds']:>9.2f}{row['tokens_per_s']:>11,.0f}{row['rows']:>12,}"
                f"{row['bytes'] / 1e6:>10.1f}{row['model_tokens']:>14,}"
            )
        same = "the same bits" if found[kind]["equal_bits"] else "DIFFERENT bits"
        lines.append(
            f"{kind}: {found['trials']} trials on one stream are {found[kind]['speedup']:.2f} x as fast; {same}"
        )
    return "\n".join(lines)


def run_sweep(config: str, out: Path, *words: str) -> float | None:
    """Seconds of jobs/sweep.py; None where the sweep was there."""
    if (out / "report.html").exists():
        return None
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--config", config, f"--out={out}", *words]
    subprocess.run(command, check=True, cwd=ROOT)
    passed = time.perf_counter() - began
    files.write_json(str(out / "seconds.json"), {"seconds": passed})
    return passed


def asha(o: argparse.Namespace) -> dict[str, Any]:
    """`minutes`, `share_of_full_steps`, `worst_excess` of the cut sweep's frontier over the full grid's, and both."""
    folder = Path(o.folder).resolve()
    run_sweep(o.config, folder / "cut", *o.words)
    run_sweep(o.config, folder / "full", "--asha=null", *o.words)
    cut, full = Sweep(str(folder / "cut")), Sweep(str(folder / "full"))
    minutes = {
        name: json.loads((folder / name / "seconds.json").read_text())["seconds"] / 60 for name in ("cut", "full")
    }
    fronts = {name: list(zip(s.pareto()["trial"], s.pareto()["l0"], s.pareto()["fvu"], strict=True))
              for name, s in (("cut", cut), ("full", full))}  # fmt: skip
    whole = [row[1:] for row in fronts["full"]]
    return {
        "minutes": minutes["cut"],
        "minutes_full": minutes["full"],
        "share_of_full_steps": files.read_mapping(f"{cut.out}/sweep.json")["share_of_full_steps"],
        "worst_excess": worst_excess([whole[i] for i in frontier(whole)], [row[1:] for row in fronts["cut"]]),
        "frontier": fronts,
    }


def worst_excess(full: list[tuple[float, float]], cut: list[tuple[float, float]]) -> float:
    """By how much fvu is larger, at most, at the points of `full`, if one has only `cut`: between its points on lines
    in (log l0, log fvu); beyond its last, what that gives; before its first, infinitely."""

    line = sorted((log(l0), log(fvu)) for l0, fvu in cut)

    def at(x: float, y: float) -> float:
        after = next((i for i, (l0, _) in enumerate(line) if l0 >= x), len(line))
        if after == 0 and line[0][0] > x:
            return math.inf
        inside = 0 < after < len(line)
        reached = interpolate(line[after - 1], line[after], x) if inside else line[min(after, len(line) - 1)][1]
        return math.exp(reached - y) - 1

    return max(at(log(l0), log(fvu)) for l0, fvu in full)


def asha_table(found: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{found['minutes']:.1f} minutes, {found['share_of_full_steps']:.0%} of the steps of the full grid "
        f"({found['minutes_full']:.1f} minutes); fvu at the points of its frontier at most "
        f"{found['worst_excess']:+.1%}"
    ]
    for name, front in found["frontier"].items():
        lines += [f"{name:<5}{trial:<44}{l0:>8.1f}{fvu:>9.4f}" for trial, l0, fvu in front]
    return "\n".join(lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="mode", required=True)
    one = kinds.add_parser("shared", help="trials on one stream against trials alone")
    one.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"), help="its store must be there")
    one.add_argument("--wiring", default="transcoder")
    one.add_argument("--features", type=int, default=256)
    one.add_argument("--batch", type=int, default=1024)
    one.add_argument("--steps", type=int, default=64)
    one.add_argument("--trials", type=int, default=4)
    one.add_argument("--repeats", type=int, default=3)
    other = kinds.add_parser("asha", help="halving against the full grid")
    other.add_argument("--config", default=str(ROOT / "configs" / "sweeps" / "quickstart.yaml"))
    other.add_argument("--folder", default="runs/sweeps/benchmark")
    other.add_argument("words", nargs="*", help="after --: overrides for both sweeps")
    for parser in (one, other):
        results.option(parser)
    return p.parse_args(argv)


def main() -> None:
    """Measure, print, write."""
    o = arguments()
    found = shared(o) if o.mode == "shared" else asha(o)
    results.deliver(found, shared_table(found) if o.mode == "shared" else asha_table(found), o.json)


if __name__ == "__main__":
    main()
