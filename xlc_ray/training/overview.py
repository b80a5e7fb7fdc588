"""A run directory as lines for the terminal: settings, wiring, how far it is, its last metrics."""

from __future__ import annotations

from collections.abc import Iterator

from xlc_ray import files
from xlc_ray.config import Config, load_config_text
from xlc_ray.dictionary import Wiring, checkpoint
from xlc_ray.training import logs, plan

SHOWN = ("loss", "explained_variance", "l0", "dead_features", "grad_norm", "lr", "tokens_per_s")
"""Metrics in the overview, where the run has them; metrics.jsonl has all."""


def overview(run_dir: str) -> Iterator[str]:
    """What a run is and how far it is. Raises UserError where its config.yaml is missing or damaged."""
    config = load_config_text(files.read_bytes(files.join(run_dir, "config.yaml")), f"{run_dir}/config.yaml")
    steps = checkpoint.steps(run_dir)
    facts = checkpoint.facts(run_dir, steps[-1]) if steps else {}
    yield f"{run_dir}: step {steps[-1] if steps else 0:,} of {config.train.steps:,}, {facts.get('tokens', 0):,} tokens"
    yield f"model {config.model.name}, activations {config.source.path}"
    yield from _dictionary(config, checkpoint.wiring_from(facts["wiring"]) if steps else None)
    names = ", ".join(f"step_{step}" for step in steps) if steps else "none that is complete"
    yield f"checkpoints: {names}"
    if lines := logs.read(run_dir):
        last = lines[-1]
        found = ", ".join(f"{name} {last[name]:.4g}" for name in SHOWN if last.get(name) is not None)
        yield f"metrics: {len(lines)} lines, the last of step {last['step']:,}: {found}"


def _dictionary(config: Config, wiring: Wiring | None) -> Iterator[str]:
    d = config.dictionary
    gate = ", ".join(f"{key} {value}" for key, value in d.gate.model_dump(mode="json").items() if key != "kind")
    yield f"wiring {d.wiring.kind}, gate {d.gate.kind}" + (f" ({gate})" if gate else "")
    yield f"normalization {d.normalization.kind}, {d.features:,} features a group"
    if wiring is None:
        return
    yield f"{wiring.groups} groups, {plan.work(config, wiring).parameters:,} parameters"
    for g, (reads, writes) in enumerate(zip(wiring.reads, wiring.writes, strict=True)):
        yield f"  group {g}: {_sites(reads)} ({wiring.width(reads)}) -> {_sites(writes)} ({wiring.width(writes)})"


def _sites(sites: tuple[str, ...]) -> str:
    return ", ".join(sites) if len(sites) < 4 else f"{sites[0]}, … {sites[-1]} ({len(sites)} sites)"
