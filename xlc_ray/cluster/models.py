"""A pool of language-model actors that make chunks, for one asyncio event loop.

It begins with one model and grows while work waits that somebody is in a hurry for, up to `cluster.model_actors` and
the room that the workers of training leave, or to the places that are reserved for it; a model that has been idle for
long goes, but for the last.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from xlc_ray.cluster.placement import FULL, layouts
from xlc_ray.config import Config

IDLE_SECONDS = 60.0
"""A model that had nothing to do for so long goes, if it is not the only one."""


class Harvesting:
    """The actor. The libraries of language models are imported here alone."""

    def __init__(self, config: Config, sites: Sequence[str]) -> None:
        from xlc_ray.cluster.generate import Harvester

        self._harvester = Harvester(config, list(sites), {False: config.source.path})

    def load(self) -> str:
        """The id of this node, when the model is loaded."""
        self._harvester.load()
        return ray.get_runtime_context().get_node_id()

    def make(self, index: int) -> tuple[dict[str, Any], str]:
        """A chunk of the training split, and the id of this node, which says that it is there without fetching it."""
        return self._harvester.make(False, index), ray.get_runtime_context().get_node_id()


@dataclass(eq=False)
class Model:
    """An actor."""

    actor: Any
    place: Any
    """Where it is bound to: one of the places that are reserved; None: Ray chose."""
    node: str = ""
    """The id of the node where it was last heard of."""
    since: float = field(default_factory=time.monotonic)
    """When it became idle last."""


class Models:
    """The pool. `hurry` says whether anybody waits for what is made; `places`: a scheduling strategy of Ray for each
    model that room is reserved for. Without any, models take what is free."""

    def __init__(
        self, config: Config, sites: Sequence[str], hurry: Callable[[], bool], places: Sequence[Any] = ()
    ) -> None:
        self._config, self._sites, self._hurry, self._places = config, sites, hurry, places
        self._all: list[Model] = []
        self._idle: list[Model] = []
        self._waiting: deque[asyncio.Future[Model]] = deque()
        self._loading: asyncio.Task[None] | None = None
        self.most = 0
        """Models at once, so far."""

    async def make(self, index: int) -> ray.ObjectRef:
        """Reference to a chunk, {site: [rows, width]}, when it is made. Raises RayError: what making it raised."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self.look()
        model = await turn
        values, there = model.actor.make.options(num_returns=2).remote(index)
        try:
            model.node = await there
        finally:
            self._free(model)
        return values

    def by_node(self) -> Counter[str]:
        """How many there are, by the id of their node."""
        return Counter(model.node for model in self._all)

    def release(self) -> None:
        """End all models, and whatever they are asked for."""
        if self._loading:
            self._loading.cancel()
        for turn in self._waiting:
            turn.cancel()
        for model in self._all:
            ray.kill(model.actor)
        self._all, self._idle, self._loading = [], [], None
        self._waiting.clear()

    def look(self) -> None:
        """Give work to who is idle; get one model more, or let one go, if it is time."""
        while self._waiting and self._idle:
            self._waiting.popleft().set_result(self._idle.pop())
        if self._waiting and self._loading is None and (not self._all or (self._hurry() and self._room())):
            self._loading = asyncio.get_running_loop().create_task(self._load())
        for model in self._idle[:-1]:  # who became idle last works first, so that those before stay so
            if time.monotonic() - model.since > IDLE_SECONDS:
                self._all.remove(model)
                self._idle.remove(model)
                ray.kill(model.actor)

    def _room(self) -> bool:
        """Whether one model more may be, and finds room now, beside the workers that are wanted or reserved for it."""
        if self._places:
            return len(self._all) < len(self._places)
        cluster, workers = self._config.cluster, layouts(self._config)[0].workers
        have, free = ray.cluster_resources(), ray.available_resources()
        kinds = {
            "CPU": (cluster.cpus_per_model, cluster.cpus_per_worker),
            "GPU": (cluster.gpus_per_model, cluster.gpus_per_worker),
        }
        fits = all(
            have.get(kind, 0) - workers * worker + FULL >= (len(self._all) + 1) * model
            and free.get(kind, 0) + FULL >= model
            for kind, (model, worker) in kinds.items()
            if model
        )
        return fits and len(self._all) < cluster.model_actors

    async def _load(self) -> None:
        cluster, taken = self._config.cluster, [model.place for model in self._all]
        place = next((place for place in self._places if place not in taken), None)
        # Ray starts one that dies again, and repeats what it was doing.
        actor = ray.remote(Harvesting).options(
            num_cpus=cluster.cpus_per_model,
            num_gpus=cluster.gpus_per_model,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=place,
        )
        model = Model(actor.remote(self._config, self._sites), place)
        self._all.append(model)
        self.most = max(self.most, len(self._all))
        try:
            model.node = await model.actor.load.remote()
        except RayError as error:  # of its constructor or libraries, which no restart would mend
            for turn in self._waiting:
                turn.set_exception(error)
            self._waiting.clear()
        self._loading = None
        self._free(model)

    def _free(self, model: Model) -> None:
        if model in self._all:
            model.since = time.monotonic()
            self._idle.append(model)
            self.look()
