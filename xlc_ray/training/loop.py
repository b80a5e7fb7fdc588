"""One rank's training, from a store of activations to checkpoints. Without a cluster it is the whole job."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xlc_ray import files
from xlc_ray.activations import order, sites, source, store
from xlc_ray.activations.source import Memory, Share
from xlc_ray.config import Config, UserError, load_config_text
from xlc_ray.dictionary import Dictionary, Shards, Wiring, checkpoint
from xlc_ray.dictionary.build import build, check_features, make_wiring, normalize_by
from xlc_ray.training.calibration import start_bias
from xlc_ray.training.feed import Feed, Read, Reader, Shape, for_all_ranks, goes_packed, shared
from xlc_ray.training.learner import Learner
from xlc_ray.training.logs import FILE, Clock, Log
from xlc_ray.training.resampling import resample
from xlc_ray.training.saving import Saved, Saving
from xlc_ray.training.schedules import resampled_after

CPU = torch.device("cpu")
ReadBatches = Callable[[store.Store, order.Order, Sequence[str], Share, Memory], Read]
"""`source.batches`, or another function that gives the same."""
FREE = (
    "out",
    "cluster",
    "evaluate",
    "generate",
    "source.cache",
    "source.held_chunks",
    "source.make_if_missing",
    "source.tee",
    "source.token_env",
    "source.verify",
    "train.log_every",
    "train.checkpoint_every",
    "train.async_checkpoints",
    "train.keep",
    "train.wandb",
)
"""Settings that may differ when a run goes on; all others decide its result."""


def wiring_for(config: Config, data: store.Store) -> Wiring:
    """The wiring over the sites of a store. Raises UserError on sites that the store lacks, and on a wiring that the
    settings of training cannot train."""
    have = data.manifest.sites
    layers = 1 + max(sites.parse(site)[1] for site in have)
    widths = {sites.of_base(site): width for site, width in have.items()}
    width = widths.get(False) or next(iter(have.values()))
    wiring = make_wiring(config.dictionary.wiring, layers, width, widths.get(True))
    if missing := [s for s in wiring.sites if s not in have]:
        raise UserError(f"{config.source.path}: the store has no site {missing[0]}; it has: {', '.join(have)}")
    check_features(config.dictionary, wiring)
    if config.train.resample and wiring.tied:
        config.train.resample.check_tying(wiring.tied.by)
    store.check_model(data, config.model.name)
    if config.train.end_to_end and not data.manifest.has_text:
        raise UserError(f"train.end_to_end: the store {config.source.path} does not know the text of its rows")
    return wiring


def order_for(config: Config, chunk_rows: Sequence[int]) -> order.Order:
    """The order of a store's rows in this run."""
    read = config.source
    return order.Order(chunk_rows, config.seed, read.slice_rows, read.window_slices, read.mix_chunks)


def reading(batches: ReadBatches, config: Config, data: store.Store, shards: Shards) -> Reader:
    """A reader of a run's rows by `batches`."""

    def read(wiring: Wiring, first: int, memory: Memory) -> Read:
        train, whose = config.train, (shards.replica, shards.replicas)
        share = Share(train.batch_tokens, first, train.steps, *whose, train.accumulate)
        return batches(data, order_for(config, data.chunk_rows), wiring.sites, share, memory)

    return read


def in_process(config: Config, data: store.Store, shards: Shards, device: torch.device = CPU) -> Reader:
    """A reader without a cluster, for ranks on a device."""
    return reading(_batches_for(data, device), config, data, shards)


def _batches_for(data: store.Store, device: torch.device) -> ReadBatches:
    return source.packed_batches if goes_packed(data.dtype, device) else source.batches


def prepare(config: Config) -> int | None:
    """Make the run directory and write config.yaml, or find the run to go on with: its newest step, or None.

    Raises UserError where the directory cannot be written or holds another run."""
    path = files.join(config.out, "config.yaml")
    with files.writing(f"out: {config.out}"):
        found = checkpoint.steps(config.out)
        if found:
            before = load_config_text(files.read_bytes(path), path)
            if changed := _differences(before, config):
                raise UserError(
                    f"{config.out}: holds a run with other settings ({changed[0]}: {changed[1]!r}, now "
                    f"{changed[2]!r}); choose another --out"
                )
        else:
            _unused(config.out)
            files.remove(files.join(config.out, FILE))
        files.write_bytes(path, config.yaml().encode())
    return found[-1] if found else None


def _unused(out: str) -> None:
    """Raises UserError where a directory without checkpoints holds what a new run must not replace."""
    if damaged := checkpoint.damaged(out):
        raise UserError(f"{damaged[0]}; no other is left: choose another --out, or remove {out}")
    if files.exists(files.join(out, "manifest.json")):
        raise UserError(f"{out}: holds activations; choose another --out")
    path = files.join(out, "config.yaml")
    if files.exists(path):
        try:
            load_config_text(files.read_bytes(path), path)
        except UserError as error:
            raise UserError(f"{out}: its config.yaml is of no run ({error}); choose another --out") from None


def _differences(before: Config, now: Config) -> tuple[str, Any, Any] | None:
    def flat(tree: Any, path: str) -> dict[str, Any]:
        if path in FREE:
            return {}
        if not isinstance(tree, dict):
            return {path: tree}
        return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{path}.{key}".lstrip(".")).items()}

    old, new = flat(before.model_dump(mode="json"), ""), flat(now.model_dump(mode="json"), "")
    changed = [(path, old.get(path), new.get(path)) for path in old | new if old.get(path) != new.get(path)]
    return changed[0] if changed else None


def train_rank(
    config: Config,
    data: store.Store,
    shards: Shards,
    reader: Reader,
    device: torch.device,
    announce: Callable[[dict[str, Any]], None],
    saved: Saved,
    stepped: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint if there is one. Returns the last metrics.

    Every rank calls `announce` with each line of metrics, `saved` when a checkpoint is complete, and `stepped` with the
    number of each step made.
    """
    batches = for_all_ranks(config, data.dtype, reader, shards, device)
    *_, last = train_by_steps(config, data, shards, batches, device, announce, saved, (), stepped)
    assert last is not None
    return last


def train_by_steps(
    config: Config,
    data: store.Store,
    shards: Shards,
    batches: Feed,
    device: torch.device,
    announce: Callable[[dict[str, Any]], None],
    saved: Saved,
    stops: Collection[int],
    stepped: Callable[[int], None] = lambda step: None,
    more: Callable[[Dictionary], dict[str, Any]] = lambda dictionary: {},
) -> Generator[dict[str, Any] | None, None, None]:
    """Likewise, a step at a time, on batches that are on the device: None, or the metrics after each of the steps
    `stops` that are left, and after the last.

    At those `more`, called by every rank, adds to the metrics, and a checkpoint is complete. Close it to stop training.
    """
    wiring = wiring_for(config, data)
    dictionary = build(config.dictionary, wiring, config.seed, shards)
    normalize_by(dictionary, config.dictionary.normalization, config.dictionary.wiring.kind, data.statistics())
    learner = Learner(dictionary.to(device), config)
    found = checkpoint.newest(config.out, shards)
    if found is not None:
        learner.resume(config.out, found)
    elif config.dictionary.bias_init != "zeros":
        kept = order_for(config, data.kept_rows)
        tokens = config.train.calibration_tokens
        start_bias(
            dictionary, lambda site: source.first_rows(data, kept, (site,), tokens)[site], config.dictionary.bias_init
        )
    log = Log(config) if shards.first else None
    try:
        with Saving(learner, saved) as saving:
            yield from _steps(config, learner, data, batches, log, announce, saving, stops, stepped, more)
    finally:
        if log:
            log.close()


def _steps(
    config: Config,
    learner: Learner,
    data: store.Store,
    batches: Feed,
    log: Log | None,
    announce: Callable[[dict[str, Any]], None],
    saving: Saving,
    stops: Collection[int],
    stepped: Callable[[int], None],
    more: Callable[[Dictionary], dict[str, Any]],
) -> Iterator[dict[str, Any] | None]:
    train, first = config.train, learner.step
    steps = _each_step(config, learner, data, batches)
    clock, metrics = Clock(), {"step": first, "tokens": first * train.batch_tokens}
    while learner.step < train.steps:
        asked = time.perf_counter()
        train_step = next(steps)
        clock.waited += time.perf_counter() - asked
        last = learner.step + 1 == train.steps
        stop = last or learner.step + 1 in stops
        due = resampled_after(train.resample, learner.step + 1, train.steps) == learner.step + 1
        measure = stop or due or learner.step == first or (learner.step + 1) % train.log_every == 0
        found = train_step(measure)
        stepped(learner.step)
        if due and found is not None:
            found["resampled"] = resample(learner, lambda: _sample(config, learner, data))
        clock.tokens += train.batch_tokens
        clock.steps += 1
        if found is not None:
            metrics = {"step": learner.step, "tokens": learner.step * train.batch_tokens, **found, **clock.read()}
            if stop:
                metrics |= more(learner.dictionary)
            if log:
                log.write(metrics)
            announce(metrics)
        if stop or learner.step % train.checkpoint_every == 0:
            saving.save(metrics)
        saving.check()
        if stop and not last:
            saving.finish()
        if not last:
            yield metrics if stop else None
    saving.finish()
    yield metrics


def _sample(config: Config, learner: Learner, data: store.Store) -> Iterator[Mapping[str, Tensor]]:
    """The rows that resampling draws from: those that training reads next, of one epoch, all of them on every rank."""
    train, wiring, shards = config.train, learner.dictionary.wiring, learner.shards
    assert train.resample is not None
    rows_in_order = order_for(config, data.chunk_rows)
    epoch, here = rows_in_order.epoch_rows, learner.step * train.batch_tokens
    tokens = min(train.resample.tokens, epoch)
    start = min(here, (here // epoch + 1) * epoch - tokens)  # a row that came twice could start two equal features
    rows = train.batch_tokens // (shards.replicas * train.accumulate)
    batches = range(start // rows, -(-(start + tokens) // rows))

    def read(memory: Memory) -> Read:
        share = Share(rows, batches.start, batches.stop)
        return _batches_for(data, learner.device)(data, rows_in_order, wiring.sites, share, memory)

    found = shared(read, len(batches), Shape.of(config, wiring, rows, data.dtype), shards, learner.device)
    for n, batch in zip(batches, found, strict=True):
        inside = slice(max(0, start - n * rows), start + tokens - n * rows)
        yield {site: values[inside] for site, values in batch.items()}


def _each_step(
    config: Config, learner: Learner, data: store.Store, batches: Feed
) -> Iterator[Callable[[bool], dict[str, float] | None]]:
    """For each step that is left: what trains on its batch, given whether to measure."""
    train, wiring, first = config.train, learner.dictionary.wiring, learner.step
    if train.end_to_end:
        from xlc_ray.training.end_to_end import EndToEnd  # with its language-model libraries, which others do not need

        frozen = EndToEnd(learner.dictionary, config, data)
        rows = train.batch_tokens // learner.shards.replicas
        for step in range(first, train.steps):
            yield partial(learner.train_on, frozen.batch(step), rows)
        return
    for batch in batches(wiring, first):
        yield partial(learner.train_step, batch)


def train_alone(config: Config, announce: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """The whole training job in this process: no cluster, one rank. For small runs, tests and debuggers."""
    prepare(config)
    data, shards = store.open_source(config.source), Shards()
    if config.source.verify:
        data.verify()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = in_process(config, data, shards, device)
    return train_rank(config, data, shards, reader, device, announce, lambda step, metrics: None)
