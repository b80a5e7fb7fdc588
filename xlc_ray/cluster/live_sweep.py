"""What a sweep on a live source needs besides: room for the language models and the chunks of each worker group, looked
at before anything starts, and at its end the store of `tee`.

Which trials share the chunks is decided as for stored ones; each group has generators of its own (trial.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from xlc_ray.activations.live import LiveStore
from xlc_ray.activations.store import Store, open_source
from xlc_ray.cluster import live, preflight
from xlc_ray.cluster.placement import nodes_now, one_by_one
from xlc_ray.config import UserError
from xlc_ray.config.sources import LiveSource
from xlc_ray.sweeps.space import Trial
from xlc_ray.training import loop


def refuse_locally(trials: Sequence[Trial]) -> None:
    """Raises UserError where trials need a cluster."""
    if any(trial.models for trial in trials):
        raise UserError(
            "--local: with source.kind: live, actors of a Ray cluster make the activations; leave out --local, or give "
            "source.kind: store"
        )


def check(trials: Sequence[Trial], stores: Mapping[str, Store]) -> int | None:
    """Worker groups whose chunks the object stores hold at once; None where no trial is live. Raises UserError, one
    line, where the cluster has no room for one group.

    `stores`: by path, as the trials name it."""
    nodes, limits, problems = nodes_now(free=False), [], []
    memory = {n["NodeID"]: n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["Alive"]}
    for trial in trials:
        config, data = trial.config, stores[trial.config.source.path]
        if not isinstance(config.source, LiveSource) or not isinstance(data, LiveStore):
            continue
        live.check(config, data)
        wiring = loop.wiring_for(config, data)
        if place := one_by_one(trial.workers, nodes, config.cluster):  # else the sweep has refused the trial
            problems += preflight.model_room(config, place, nodes, trial.models)
        problems += preflight.held_chunks(config.source, data, wiring, nodes, memory)
        limits.append(int(min(memory.values()) // preflight.held_bytes(config.source, data, wiring)))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return min(limits, default=None)


def complete_tees(trials: Sequence[Trial]) -> None:
    """Complete each store that trials wrote beside, if every chunk was made."""
    by_path = {s.tee: trial.config for trial in trials if isinstance(s := trial.config.source, LiveSource) and s.tee}
    for config in by_path.values():
        data = open_source(config.source)
        assert isinstance(data, LiveStore)
        live.finish(config, data)
