"""The plan of a run in words, and the layouts that fit: what `jobs/plan.py` prints, line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig

from xlc_ray.activations import sites
from xlc_ray.activations.text import from_pretrained
from xlc_ray.config import Config, UserError
from xlc_ray.config.dictionary import JumpReluGate
from xlc_ray.config.sources import LiveSource
from xlc_ray.dictionary.build import check_features, make_wiring
from xlc_ray.dictionary.wiring import Wiring
from xlc_ray.progress import duration
from xlc_ray.training import plan
from xlc_ray.training.machine import GB, GPUS, Machine, measure

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bfloat16_zstd": 1.4, "int8": 1}


def forecast(config: Config, gpu: str | None, nodes: int, active: float | None) -> Iterator[str]:
    """Lines: the dictionary, its cost, the disk it needs, and the layouts that fit, fastest first.

    `gpu`: one of GPUS, or None for this machine's processors, which are measured first. Raises UserError where the
    model is not known or nothing fits."""
    if gpu is not None and gpu not in GPUS:
        raise UserError(f"--gpu: {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    if nodes < 1 or (gpu is None and nodes > 1):
        raise UserError(f"--nodes: {nodes}; allowed: {'1 or more' if gpu else '1 without --gpu'}")
    if active is not None and not 0 < active < math.inf:
        raise UserError(f"--active: {active:g}; allowed: a number of features above 0")
    model = from_pretrained(AutoConfig, config.model, "configuration")
    base = from_pretrained(AutoConfig, config.base_model, "configuration") if config.base_model else model
    widths = sites.width(model), sites.width(base)
    wires = make_wiring(config.dictionary.wiring, sites.num_layers(model), *widths)
    check_features(config.dictionary, wires)
    for site in (*wires.sites, *(config.generate.sites or ())):
        sites.parse(site)
    load = plan.work(config, wires, active)
    stored = _bytes_of_token(config, wires, *widths)
    yield from _cost(config, load)
    yield from _held(load, gpu is None)
    train = config.generate.tokens
    if isinstance(config.source, LiveSource):
        train = train if config.source.tee else min(train, config.source.sample_tokens)
        held = min(config.source.held_chunks * config.generate.chunk_tokens, config.generate.tokens)
        yield (
            f"live          {held * stored / GB:,.1f} GB of chunks in the object store at most; the language "
            "model's time is not counted below"
        )
    tokens = train + config.generate.held_out_tokens
    yield f"disk          {tokens * stored / GB:,.1f} GB of activations: {tokens:,} tokens of {stored:,} bytes"
    if config.train.end_to_end:
        runs = 1 + len(wires.written_sites)
        yield f"end to end    {runs} runs of the language model a batch on every worker come on top: not counted below"
    read = BYTES[config.generate.dtype] * load.stored
    device = measure(torch.device("cpu")) if gpu is None else GPUS[gpu]
    found = _here(config, load, device, read) if gpu is None else _everywhere(config, load, device, nodes, read)
    for each in found:
        yield _line(config, load, each)


def _bytes_of_token(config: Config, wires: Wiring, width: int, base_width: int) -> int:
    """What a token takes on disk."""
    chosen = config.generate.sites
    stored = (
        wires.width(wires.sites) if chosen is None else sum(base_width if sites.of_base(s) else width for s in chosen)
    )
    return round(BYTES[config.generate.dtype] * stored)


def _cost(config: Config, load: plan.Work) -> Iterator[str]:
    d, flops, batch = config.dictionary, load.flops, config.train.batch_tokens
    sparse = [g for g in load.groups if g.sparse]
    yield (
        f"dictionary    {d.wiring.kind}, {d.gate.kind}: {len(load.groups)} groups of {d.features:,} features, "
        f"{load.parameters / 1e6:,.1f}M parameters"
    )
    which = "all" if len(sparse) == len(load.groups) else "no" if not sparse else str(len(sparse))
    yield f"products      of {sum(load.active):,.0f} features a token{_why(config, load)}; sparse in {which} groups"
    yield (
        f"FLOPs a token {flops['encode'] / 1e6:,.1f}M to encode, {(flops['sparse'] + flops['dense']) / 1e6:,.1f}M in "
        f"all products ({load.dense_flops / sum(flops.values()):.1f} x as many if all were dense)"
    )
    if load.penalty:
        yield (
            "penalty       reads all pre-activations, also where products are sparse: held with their gradient, and "
            "the encoder's gradient is dense"
        )
    moved = load.number * load.parameters * (8 + load.clip)
    yield (
        f"bytes a token {moved / batch / 1e6:,.2f} MB of weights, gradients and moments "
        f"({moved / GB:,.1f} GB a step of {batch:,} tokens)"
    )


def _why(config: Config, load: plan.Work) -> str:
    """Where the number of features in products comes from."""
    if isinstance(config.dictionary.gate, JumpReluGate):
        which = "above the threshold and half a bandwidth below it, more than l0"
        if load.known:
            return f" (--active), those {which}"
        return f" at most: those {which}, are not known before a run (--active says otherwise)"
    return "" if load.known else " (a guess: --active says otherwise)"


def _held(load: plan.Work, host: bool) -> Iterator[str]:
    """What memory depends on besides the layout."""
    if load.begins_dense and any(g.sparse for g in load.groups):
        yield "memory        of dense features: the first steps may be dense"
    if load.int8:
        own = load.parameters
        yield (
            f"moments       {load.moments(own, 1) / own:.2f} bytes a parameter, and {2 * load.number} more while a "
            "checkpoint is taken, when a step's activations are not there"
        )
    if load.copied:
        yield (
            f"checkpoints   are written from a copy of {load.copy(1) / GB:,.1f} GB a replica in host memory, "
            f"{'counted below' if host else 'beside the ranks below'} (train.async_checkpoints: false takes none)"
        )


def _everywhere(config: Config, load: plan.Work, device: Machine, nodes: int, read: float) -> list[Layout]:
    """All layouts that fill the nodes."""
    return layouts(config, load, device, nodes * device.node, read)


def _here(config: Config, load: plan.Work, device: Machine, read: float) -> list[Layout]:
    """The layout of the settings, whose ranks share this machine."""
    t, r = config.cluster.tensor_parallel, config.cluster.replicas
    ranks = t * r
    part = replace(
        device,
        matmul={name: rate / ranks for name, rate in device.matmul.items()},
        gather=device.gather / ranks,
        bandwidth=device.bandwidth / ranks,
        node=ranks,
    )
    found = layout(config, load, part, t, r, read)
    room = plan.USABLE * device.memory
    if found.bytes * ranks > room:
        raise UserError(
            f"plan: {ranks} ranks of {found.bytes / GB:.1f} GB do not fit into {room / GB:.1f} GB of this machine's "
            f"memory; make dictionary.features or train.batch_tokens smaller, or plan with --gpu {'|'.join(GPUS)}"
        )
    return [found]


def _line(config: Config, load: plan.Work, found: Layout) -> str:
    seconds = found.prediction.seconds
    p = found.prediction
    parts = {"encode": p.encode, "select": p.select, "products": p.products, "optimizer": p.optimizer}
    parts |= {"communication": p.communication, "data": p.data}
    shares = ", ".join(f"{name} {s:.3g} s" for name, s in parts.items() if s)
    return (
        f"tp {found.tensor_parallel} x {found.replicas} replicas: {found.bytes / GB:.1f} GB a rank, "
        f"{load.tokens / seconds:,.0f} tokens/s, {duration(seconds * config.train.steps)} for all steps; "
        f"{p.binds} binds ({shares})"
    )


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """One way to place a run: ranks a replica, replicas, bytes of a rank, and the time of a step."""

    tensor_parallel: int
    replicas: int
    memory: Mapping[str, float]
    prediction: plan.Prediction

    @property
    def bytes(self) -> float:
        """Of a rank."""
        return sum(self.memory.values())


def layout(
    config: Config, load: plan.Work, device: Machine, tensor_parallel: int, replicas: int, data: float
) -> Layout:
    """One placement, whether it fits or not."""
    held = plan.memory(load, tensor_parallel, replicas, config.train.accumulate, host=device.name == "cpu")
    time = plan.predict(load, device, config.train.precision, tensor_parallel, replicas, data)
    return Layout(tensor_parallel, replicas, held, time)


def layouts(config: Config, load: plan.Work, device: Machine, devices: int, data: float) -> list[Layout]:
    """Placements on so many devices that fit, fastest first. Raises UserError, which says why, where none does."""
    room, refused = plan.USABLE * device.memory, []
    fitting = []
    for t in (n for n in range(1, devices + 1) if devices % n == 0):
        r = devices // t
        if t > device.node or device.node % t:
            refused.append(f"tp {t} would leave the node of {device.node}")
        elif t > config.dictionary.features:
            refused.append(f"tp {t} exceeds dictionary.features = {config.dictionary.features}")
        elif config.train.batch_tokens % (r * config.train.accumulate):
            refused.append(f"tp {t} x {r} replicas do not divide train.batch_tokens = {config.train.batch_tokens}")
        else:
            found = layout(config, load, device, t, r, data)
            if found.bytes <= room:
                fitting.append(found)
            else:
                refused.append(f"tp {t} needs {found.bytes / GB:.1f} of {room / GB:.1f} GB a rank")
    if not fitting:
        raise UserError(f"plan: no layout fits {devices} x {device.name}: {'; '.join(refused)}; use more devices")
    return sorted(fitting, key=lambda found: found.prediction.seconds)
