"""Several runs on one stream: each batch is read once, and every run trains on it before the next one is read.

Each run is what training it alone gives, bit for bit: its learner, its checkpoints and its lines of metrics are its
own, and what they share is only read. At most two batches are held. A run that leaves costs nothing from then on.

Runs share where their settings agree on what is read: `stream` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from xlc_ray.activations import store
from xlc_ray.config import Config
from xlc_ray.config.sources import LiveSource
from xlc_ray.dictionary import Dictionary, Shards, Wiring, checkpoint
from xlc_ray.training import loop
from xlc_ray.training.feed import Reader, for_all_ranks
from xlc_ray.training.learner import Batch, Diverged
from xlc_ray.training.saving import Stop

Line = dict[str, Any]


def stream(config: Config, data: store.Store) -> Hashable:
    """Equal for runs that read the same rows of the same sites in the same order on as many ranks (and, live, from as
    many language models of the same size), and for no others. Raises UserError where the store does not fit.

    Training by what the language model predicts reads text of its own: such a run is equal to itself alone."""
    sites, cluster = frozenset(loop.wiring_for(config, data).sites), config.cluster
    if config.train.end_to_end:
        return config.out
    ranks = cluster.tensor_parallel, cluster.replicas, cluster.cpus_per_worker, cluster.gpus_per_worker
    models = cluster.model_actors, cluster.cpus_per_model, cluster.gpus_per_model
    made_by = models if isinstance(config.source, LiveSource) else None
    rows = config.train.batch_tokens, config.train.accumulate if cluster.replicas > 1 else 1  # which a replica's are
    return config.source.model_dump_json(), config.seed, rows, ranks, made_by, sites


@dataclass(frozen=True)
class Run:
    """One run of several."""

    config: Config
    stops: Collection[int] = ()
    """Steps, besides the last, after which it pauses."""
    announce: Callable[[Line], None] = lambda metrics: None
    more: Callable[[Dictionary], dict[str, Any]] = lambda dictionary: {}
    asked: Callable[[], bool] = lambda: False
    """Whether it should end at its next checkpoint: asked on the first rank whenever one is complete."""
    known: Mapping[int, Line] = field(default_factory=dict)
    """What it said at stops of an earlier session: said again, without training, up to its newest checkpoint."""


class Together:
    """Runs of one stream, on one rank. All ranks make the same calls."""

    def __init__(
        self, runs: Mapping[str, Run], data: store.Store, shards: Shards, reader: Reader, device: torch.device
    ):
        """`reader`: of the run with the most steps. Runs go on from their newest checkpoints, and need not be equally
        far: the stream starts where the first of them stands."""
        self.step = 0
        done = {name: checkpoint.newest(run.config.out, shards) or 0 for name, run in runs.items()}
        longest = max((run.config for run in runs.values()), key=lambda config: config.train.steps)
        read = for_all_ranks(longest, data.dtype, reader, shards, device)
        start = min(done.values())
        batches = _Batches(read(loop.wiring_for(longest, data), start), start)
        self._runs = {
            name: _Going(run, data, _own(shards, len(runs)), device, done[name], batches) for name, run in runs.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The runs that are left."""
        return tuple(self._runs)

    def advance(self) -> dict[str, Line | Diverged | Stop]:
        """Train to the next step at which a run pauses, ends, diverges or was asked to stop: what each of these has to
        say.

        What does not pause leaves. Any other error is everybody's: ranks could not agree on who goes on."""
        found: dict[str, Line | Diverged | Stop] = {}
        assert self._runs, "somebody trains"
        while not found:
            self.step += 1
            for name, run in list(self._runs.items()):
                try:
                    said = run.come_to(self.step)
                except (Diverged, Stop) as error:  # by the gradients of all ranks, or the first's word: all find it
                    said = error
                if said is not None:
                    found[name] = said
                elif self.step == run.last:
                    raise RuntimeError(f"{run.run.config.out}: trained to its end, of which nothing is known")
                if isinstance(said, Exception) or self.step == run.last:
                    self.leave(name)
        return found

    def leave(self, name: str) -> None:
        """Stop training a run; what its last stop wrote stays."""
        self._runs.pop(name).close()

    def close(self) -> None:
        """Stop training all, and with that reading."""
        for name in self.names:
            self.leave(name)


class _Batches:
    """A stream for several, who ask for the batch of a step in any order, but none for an earlier step than another has
    asked for. Nothing is read before the first asks."""

    def __init__(self, stream: Iterator[Batch], step: int):
        self.stream, self.step = stream, step
        self.batch: Batch = {}

    def of(self, step: int) -> Batch:
        """The batch that brings runs from `step` to the next step."""
        while self.step <= step:  # of steps that all have behind them, too, when one that was behind has left
            self.batch = {}
            self.batch = next(self.stream)
            self.step += 1
        assert self.step == step + 1, "runs walk in step"
        return self.batch


class _Going:
    """A run, and how far it is."""

    def __init__(self, run: Run, data: store.Store, shards: Shards, device: torch.device, done: int, batches: _Batches):
        self.run, self.done, self.last = run, done, run.config.train.steps

        def read(wiring: Wiring, first: int) -> Iterator[Batch]:
            return map(batches.of, range(first, self.last))

        def saved(step: int, metrics: Line) -> None:
            if step < self.last and shards.told(shards.first and run.asked()):
                raise Stop

        self.parts = loop.train_by_steps(
            run.config, data, shards, read, device, run.announce, saved, run.stops, more=run.more
        )

    def come_to(self, step: int) -> Line | None:
        """Be at a step, one after the last time's: by training, or because an earlier session was there."""
        return next(self.parts) if step > self.done else self.run.known.get(step)

    def close(self) -> None:
        self.parts.close()


def _own(shards: Shards, runs: int) -> Shards:
    """The same ranks, with collectives of their own for the thread that writes checkpoints: those of several threads
    would meet in any order."""
    if shards.background is None or runs == 1:
        return shards
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    return replace(shards, background=group)
