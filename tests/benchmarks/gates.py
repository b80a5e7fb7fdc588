"""Every gate in every wiring on the same activations of a small model, for the same tokens: a Markdown table.

    python tests/benchmarks/gates.py --json found.json

Each dictionary has as many features in all, and is brought to the same l0 (held out, all groups together): by k; by
`target_l0`; else by the penalty's coefficient, which is searched: of at most `--tries` runs the one that comes nearest
counts. Every run is kept in `--folder`, where the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.recipes import GATES, Recipe
from tests.training.texts import harvest
from xlc_ray import evaluation, files
from xlc_ray.activations import source
from xlc_ray.activations.store import open_store
from xlc_ray.config import Config, UserError, load_config
from xlc_ray.dictionary.checkpoint import load_dictionary, steps
from xlc_ray.training import train_alone
from xlc_ray.training.learner import Learner
from xlc_ray.training.loop import order_for

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4
ONE = {"model.name": "configs/assets/tiny-austen-gpt2-d64", "text.dataset": "configs/assets/austen.txt"}
PAIR = {
    "model.name": "configs/assets/tiny-austen-gpt2-jargon",
    "base_model": {"name": "configs/assets/tiny-austen-gpt2"},
    "text": {"mixture": [{"dataset": f"configs/assets/{name}.txt"} for name in ("jargon", "austen")]},
}
WIRINGS: dict[str, dict[str, Any]] = {
    "sae": {"kind": "sae", "site": "mlp_out"},
    "transcoder": {"kind": "transcoder"},
    "clt": {"kind": "clt"},
    "crosscoder": {"kind": "crosscoder"},
    "model_diff": {"kind": "model_diff", "site": "resid_post", "layer": 2},
}
"""The first four on one store, all layers of a model; the last on a store of two models."""
SITES = tuple(f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("mlp_in", "mlp_out", "resid_post"))
PAIR_SITES = ("resid_post.2", "resid_post.2@base")
NEAR = 0.05
"""How far from the l0 that is asked for a search may stop, as a share of it."""
STEPS = 12
COLUMNS = ("explained_variance", "l0", "dead_features", "ce_recovered", "tokens_per_s")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gates", default=",".join(GATES), help="some of " + ", ".join(GATES))
    p.add_argument("--wirings", default="sae,transcoder,clt,crosscoder", help="some of " + ", ".join(WIRINGS))
    p.add_argument("--features", type=int, default=1024, help="of all groups together")
    p.add_argument("--l0", type=int, default=32, help="active features a token, all groups together")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--batch", type=int, default=512, help="tokens of a step")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--tokens", type=int, default=200_000, help="rows of the store")
    p.add_argument("--held-out", type=int, default=16384, help="rows and tokens of text for the evaluation")
    p.add_argument("--tries", type=int, default=4, help="runs of a search at most")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--folder", default=str(ROOT / "data/gates"), help="store and runs")
    p.add_argument("--json", metavar="FILE", help="write the results; - for standard output")
    o = p.parse_args(argv)
    o.gates, o.wirings = o.gates.split(","), o.wirings.split(",")
    if unknown := [g for g in o.gates if g not in GATES] + [w for w in o.wirings if w not in WIRINGS]:
        p.error(f"--gates, --wirings: {unknown[0]!r} is none; gates: {', '.join(GATES)}; wirings: {', '.join(WIRINGS)}")
    if min(o.features // LAYERS, o.l0, o.steps, o.batch, o.tokens, o.held_out, o.tries, o.threads) < 1:
        p.error(f"numbers must be positive, and --features at least {LAYERS}")
    return o


def settings(o: argparse.Namespace, wiring: str, recipe: Recipe, coefficient: float | None) -> Config:
    """The settings of one run, whose `out` names all that decides it. Raises UserError where they are refused."""
    groups = LAYERS if wiring in ("sae", "transcoder", "clt") else 1
    changes: dict[str, Any] = {
        **(PAIR if wiring == "model_diff" else ONE),
        "out": "unnamed",
        "seed": o.seed,
        "text.context": 64,
        "generate": {"tokens": o.tokens, "held_out_tokens": o.held_out},
        "source": {"path": files.join(o.folder, "pair" if wiring == "model_diff" else "one")},
        "dictionary": {"wiring": WIRINGS[wiring], "features": o.features // groups} | recipe.dictionary(o.l0, o.steps),
        "train": {
            "steps": o.steps,
            "batch_tokens": o.batch,
            "lr": o.lr,
            "dead_after_tokens": max(o.batch, o.steps * o.batch // 4),
            "loss": recipe.loss(o.l0, coefficient),
        },
        "evaluate": {"tokens": o.held_out, "windows": max(1, o.held_out // 256), "batch_windows": 32},
        "cluster": {},
    }
    config = load_config(ROOT / "configs/quickstart.yaml", changes)
    name = hashlib.sha256(config.yaml().encode()).hexdigest()[:12]
    return config.override({"out": files.join(o.folder, "runs", f"{wiring}-{name}")})


def measured(config: Config) -> dict[str, Any]:
    """Train and evaluate, or read what an earlier call did."""
    path = files.join(config.out, "gates.json")
    if files.exists(path):
        return files.read_mapping(path)
    if config.train.steps not in steps(config.out):
        train_alone(config)
    held_out = open_store(files.join(config.source.path, "held_out"))
    found = evaluation.evaluate(load_dictionary(config.out)[0], config, held_out)
    kept = {name: found[name] for name in ("explained_variance", "fvu", "l0", "dead_features", "ce_recovered", "kl")}
    files.write_json(path, kept)
    return kept


def speed(config: Config) -> float:
    """Tokens a second of a training step at the end of a run: median of STEPS, rows in memory."""
    data = open_store(config.source.path)
    dictionary = load_dictionary(config.out)[0]
    learner = Learner(dictionary, config)
    learner.resume(config.out, config.train.steps)
    order, sites = order_for(config, data.chunk_rows), dictionary.wiring.sites
    read = source.batches(data, order, sites, source.Share(config.train.batch_tokens, 0, STEPS))
    seconds = []
    for batch in list(read):
        learner.step = config.train.steps - 1  # schedules end there
        started = time.perf_counter()
        learner.train_step(batch, False)
        seconds.append(time.perf_counter() - started)
    return config.train.batch_tokens / statistics.median(seconds)


def cell(o: argparse.Namespace, wiring: str, recipe: Recipe) -> dict[str, Any]:
    """One gate in one wiring: the run nearest to the l0 that was asked for, with its coefficient; or `refused`."""
    tried: list[tuple[float, dict[str, Any]]] = []
    runs: list[Config] = []
    coefficient = recipe.starts.get(wiring) if recipe.searched else None
    try:
        while True:
            runs.append(settings(o, wiring, recipe, coefficient))
            tried.append((coefficient or 0.0, measured(runs[-1])))
            off = [abs(math.log(max(found["l0"], 0.01) / o.l0)) for _, found in tried]
            if not recipe.searched or len(tried) >= o.tries or min(off) < NEAR:
                break
            coefficient = further(tried, o.l0)
    except UserError as error:
        return {"refused": str(error)}
    best = off.index(min(off))
    used, found = tried[best]
    return found | {"coefficient": used or None, "tries": len(tried), "tokens_per_s": speed(runs[best])}


def further(tried: list[tuple[float, dict[str, Any]]], target: float) -> float:
    """The coefficient to try next: where a line through log l0 over log coefficient, by the two nearest points on
    either side of the target, or on one, meets it. The first guess takes l0 ~ coefficient^-0.75, as L1 has it."""
    points = sorted((math.log(max(found["l0"], 0.01) / target), math.log(c)) for c, found in tried)
    above, below = [p for p in points if p[0] > 0], [p for p in points if p[0] <= 0]
    (y0, x0), *others = [*above[:1], *below[-1:]] if above and below else above[:2] or below[:-3:-1]
    slope = (x0 - others[0][1]) / (y0 - others[0][0]) if others and others[0][0] != y0 else -1 / 0.75
    if slope >= 0:  # noise between points that are close
        slope = -1 / 0.75
    return math.exp(x0 - max(-3.0, min(3.0, slope * y0)))


def run(o: argparse.Namespace) -> dict[str, Any]:
    """Everything that `--json` writes."""
    torch.set_num_threads(o.threads)
    for pair in {wiring == "model_diff" for wiring in o.wirings}:
        wiring = "model_diff" if pair else "clt"
        config = settings(o, wiring, GATES["topk"], None)
        if not files.exists(files.join(config.source.path, "held_out", "manifest.json")):
            harvest(config, PAIR_SITES if pair else SITES)
    cells: dict[str, dict[str, Any]] = {}
    for wiring in o.wirings:
        for gate in o.gates:
            found = cell(o, wiring, GATES[gate])
            cells.setdefault(gate, {})[wiring] = found
            print(f"{wiring:<12}{gate:<22}{text(found)}", file=sys.stderr, flush=True)
    shape = {name: getattr(o, name) for name in ("features", "l0", "steps", "batch", "lr", "tokens", "seed", "threads")}
    return {
        "shape": shape,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cells": cells,
    }


def text(found: dict[str, Any]) -> str:
    """A cell for people."""
    if "refused" in found:
        return found["refused"]
    variance, l0, dead, recovered, rate = (found[name] for name in COLUMNS)
    parts = [f"{variance:.3f}", f"{l0:.1f}", f"{dead:.0%}", f"{recovered:.3f}", f"{rate / 1000:.1f}k"]
    return " · ".join(parts)


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    wirings = list(next(iter(found["cells"].values())))
    lines = ["| gate | " + " | ".join(wirings) + " |", "|---" * (len(wirings) + 1) + "|"]
    for gate, cells in found["cells"].items():
        lines.append(f"| {gate} | " + " | ".join(text(cells[wiring]) for wiring in wirings) + " |")
    return "\n".join(["explained variance · l0 · dead · ce_recovered · tokens/s", "", *lines])


def main() -> None:
    """Measure, print, write."""
    o = arguments()
    found = run(o)
    if o.json == "-":
        print(json.dumps(found))
        return
    print(table(found))
    if o.json:
        Path(o.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
