"""The failures of faults.py: each is injected into a job as a user starts it, which is then followed to its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray

from tests.activations.build import make
from tests.cluster.actors import actors
from tests.cluster.hosts import Hosts
from tests.cluster.nodes import Job, steps_in, wait_for, workers
from tests.cluster.prepared import LIVE, STORED, copy_sample, settings_of, tiny
from tests.cluster.stage import EVERY, NODES, STEPS, Outcome, Stage, equal
from tests.runs import SITES
from xlc_ray.activations import store
from xlc_ray.cluster.placement import nodes_now
from xlc_ray.cluster.sweep import sweep
from xlc_ray.config.sweep import sweep_of
from xlc_ray.dictionary import checkpoint
from xlc_ray.sweeps.result import Sweep
from xlc_ray.training import train_alone

HANG = 20.0


def worker_killed(stage: Stage) -> Outcome:
    """SIGKILL to one of two ranks of a replica, between two checkpoints."""
    job = stage.train("worker", tensor_parallel=2, placement="any")
    job.at_step(EVERY + EVERY // 2)
    failed = time.monotonic()
    os.kill(workers()[0].pid, signal.SIGKILL)
    wait_for("the worker group's end", lambda: "a worker failed" in job.output(), job)
    return stage.outcome("worker killed in the middle of a step", job, failed, len(job.steps()))


def node_killed_with_spare(stage: Stage) -> Outcome:
    """All processes of a node at once; a third node has room."""
    job = stage.train("spare", replicas=2)
    job.at_step(EVERY + EVERY // 2)
    failed = time.monotonic()
    stage.nodes.kill(workers()[0].node_id)
    wait_for("the worker group's end", lambda: "a worker failed" in job.output(), job)
    return stage.outcome("node killed, a spare is there", job, failed, len(job.steps()))


def node_killed_without_spare(stage: Stage) -> Outcome:
    """All processes of one of three nodes: two replicas go on instead of three, three again once a node is back."""
    job = stage.train("smaller", replicas=NODES, min_replicas=1)
    job.at_step(EVERY + EVERY // 2)
    failed = time.monotonic()
    stage.nodes.kill(workers()[0].node_id)
    wait_for("the worker group's end", lambda: "a worker failed" in job.output(), job)
    made = len(job.steps())
    recovered = job.goes_on(made)
    stage.nodes.fill(NODES)
    outcome = stage.outcome("node killed, none to spare: fewer replicas, then all", job, failed, made, recovered)
    assert "room for 2 x 1 workers" in job.output(), job.output()
    assert "nodes are back" in job.output(), job.output()
    return outcome


def nodes_missing_at_the_start(stage: Stage) -> Outcome:
    """One node of three is there: a dictionary that two ranks should share begins on one, and goes on on two."""
    stage.nodes.fill(NODES)
    for node in stage.nodes.others[1:]:
        stage.nodes.kill(node.node_id)
    wait_for("two nodes to be missed", lambda: sum(node.cpus > 0 for node in nodes_now(free=False)) == 1)
    job = stage.start("missing", tensor_parallel=2, placement="any", fallback_tensor_parallel=[1])
    job.at_step(EVERY // 2)
    failed = time.monotonic()
    stage.nodes.fill(NODES)
    wait_for("the first group's end", lambda: "nodes are back" in job.output(), job)
    outcome = stage.outcome(
        "nodes missing at the start: one rank instead of two, then two", job, failed, len(job.steps())
    )
    assert "room for 1 x 1 workers, not for the 1 x 2 workers wanted" in job.output(), job.output()
    return outcome


def driver_killed(stage: Stage) -> Outcome:
    """SIGKILL to the driver, then the same command again."""
    job = stage.train("driver", replicas=2)
    job.at_step(EVERY + EVERY // 2)
    failed, ranks = time.monotonic(), [worker.pid for worker in workers()]
    job.kill()
    wait_for("the end of its workers", lambda: not any(map(living, ranks)))
    made = len(job.steps())
    return stage.outcome("driver killed, job submitted again", stage.train("driver", replicas=2), failed, made)


def checkpoint_cut(stage: Stage) -> Outcome:
    """SIGKILL to all ranks while a checkpoint's files are there and its marker is not."""
    job = stage.train("cut", tensor_parallel=2, placement="any", max_failures=9)
    folder = Path(job.config.out, "checkpoints")

    def torn() -> list[Path]:
        return [p for p in folder.glob("step_*") if any(p.iterdir()) and not (p / checkpoint.MARKER).exists()]

    made = 0
    while not torn():  # the marker may have come before the signal: then the next checkpoint
        job.goes_on(made)
        ranks = [worker.pid for worker in workers()]
        wait_for("a checkpoint being written", lambda: checkpoint.steps(job.config.out) and torn(), job, pause=0.0)
        failed = time.monotonic()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        wait_for("the end of the ranks", lambda pids=ranks: not any(map(living, pids)))
        made = len(job.steps())
    return stage.outcome("checkpoint cut in the middle of writing", job, failed, made)


def store_away(stage: Stage) -> Outcome:
    """The store's directory is gone until training has stood still for three seconds."""
    path = stage.folder / "store"
    job = stage.train("outage", replicas=2)
    job.at_step(1)
    failed, away = time.monotonic(), path.with_name("away")
    path.rename(away)
    still, seen = time.monotonic(), 0
    while time.monotonic() - still < 3:
        if len(job.steps()) != seen:
            still, seen = time.monotonic(), len(job.steps())
        assert seen < STEPS, "training has to read more than it had read ahead"
        time.sleep(0.05)
    away.rename(path)
    return stage.outcome("the store's file system fails for some seconds", job, failed, len(job.steps()))


def worker_hangs(stage: Stage) -> Outcome:
    """SIGSTOP to one of two ranks: nothing dies, nothing goes on."""
    job = stage.train("hang", tensor_parallel=2, placement="any", hang_timeout_s=HANG, read_retry_s=HANG / 2)
    job.at_step(EVERY + EVERY // 2)
    failed = time.monotonic()
    os.kill(workers()[0].pid, signal.SIGSTOP)
    wait_for("the worker group's end", lambda: "no step for" in job.output(), job)
    outcome = stage.outcome(f"worker hangs (hang_timeout_s: {HANG:g})", job, failed, len(job.steps()))
    assert list(Path(job.config.out, "stacks").rglob("rank_*.txt")), "the rank that waited told its stack"
    return outcome


def model_actor_killed(stage: Stage) -> Outcome:
    """SIGKILL to the language-model actor after the first chunk."""
    stage.nodes.fill(NODES)
    changes = {
        "generate.sites": ["mlp_in.0", "mlp_out.3"],
        "generate.tokens": 15000,
        "generate.chunk_tokens": 200,
        "generate.batch_windows": 1,
        "cluster.model_actors": 1,
    }
    config = tiny(stage.folder, changes)
    path, undisturbed = stage.folder / "activations", stage.folder / "undisturbed_activations"
    first = Job("generate", config.override({"source.path": str(undisturbed)}), stage.nodes)
    assert first.finish() == 0, first.output()
    job = Job("generate", config.override({"source.path": str(path)}), stage.nodes)

    def made() -> int:
        return len(list(path.rglob("records/*.json")))

    wait_for("a chunk", made, job)
    failed, before = time.monotonic(), made()
    victims = {actor.pid for actor in actors("Harvester")}
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait_for("another actor", lambda: {actor.pid for actor in actors("Harvester")} - victims, job)
    at_hand = made()
    wait_for("a chunk of the new actor", lambda: made() > at_hand, job)
    recovered = time.monotonic()
    ended = job.finish() == 0
    assert victims, "the actor was killed"
    assert before < len(chunks(undisturbed)), "in the middle"
    equal = ended and chunks(path) == chunks(undisturbed) and store.open_store(str(path)).manifest.tokens == 15000
    return Outcome("language-model actor killed while generating", ended, equal, round(recovered - failed, 1), 0)


def node_killed_under_live_training(stage: Stage) -> Outcome:
    """All processes of a node that has a rank and a language model. A third node has room for both, and is taken until
    then: else the language model might be there, and alone."""
    stage.nodes.fill(NODES)
    changes = {
        "train.steps": 300,
        "train.checkpoint_every": 20,
        "train.log_every": 1,
        "cluster.cpus_per_worker": 0.6,
        "cluster.cpus_per_model": 0.4,
    }
    stored = settings_of(stage.folder / "live_undisturbed", changes)
    generating = Job("generate", stored, stage.nodes)
    assert generating.finish() == 0, generating.output()
    undisturbed = stored.override({"source": {**STORED, "path": stored.source.path}})
    train_alone(undisturbed)
    copied = copy_sample(stored.source.path, stage.folder / "live_store")
    changes |= {"cluster.replicas": 2, "cluster.model_actors": NODES, "source": {**LIVE, "path": str(copied)}}
    taken = ray.remote(num_cpus=1)(Tenant).remote()
    ray.get(taken.__ray_ready__.remote())
    job = Job("train", settings_of(stage.folder / "live", changes), stage.nodes)
    every = job.config.train.checkpoint_every
    job.at_step(every + every // 2)

    def both() -> set[str]:
        return {actor.node_id for actor in actors("Harvesting")} & {worker.node_id for worker in workers()}

    node = both().pop()
    ray.kill(taken)
    failed = time.monotonic()
    stage.nodes.kill(node)
    wait_for("the worker group's end", lambda: "a worker failed" in job.output(), job)
    made = len(job.steps())
    recovered = job.goes_on(made)
    ended, steps = job.finish() == 0, job.steps()
    again = steps[made - 1] + 1 - steps[made]
    same = ended and equal(job.config.out, undisturbed.out)
    return Outcome(
        "node with a rank and a language model killed under live training",
        ended,
        same,
        round(recovered - failed, 1),
        again,
    )


def node_killed_under_a_sweep(stage: Stage) -> Outcome:
    """All processes of the node that a sweep's second trial trains on; other nodes have room."""
    stage.nodes.fill(NODES)
    make(stage.folder / "store/held_out", [40], sites=SITES)
    tree = {
        "base": stage.settings.model_dump(mode="json"),
        "out": f"{stage.folder}/sweep",
        "space": {"train.lr": {"choice": [0.01, 0.003, 0.001]}},
        "search": {"max_concurrent": 1},
    }
    settings, file = sweep_of(tree, "sweep.yaml"), stage.folder / "sweep.yaml"
    file.write_text(settings.yaml())
    undisturbed = sweep(file, {"out": f"{stage.folder}/undisturbed_sweep"}, local=True).frame()
    job = Job("sweep", settings, stage.nodes)
    lines = partial(steps_in, stage.folder / "sweep/trials" / undisturbed["trial"][1])
    wait_for("the second trial", lambda: lines()[-1:] >= [EVERY + EVERY // 2], job)
    failed = time.monotonic()
    (trial,) = actors("ResourceTrainable")  # as Tune calls whatever has resources
    os.kill(trial.pid, signal.SIGKILL)  # else it trains to its end before it misses its node
    stage.nodes.kill(trial.node_id)
    made = len(lines())
    wait_for("a step after the failure", lambda: len(lines()) > made, job)
    recovered, again = time.monotonic(), lines()[made - 1] + 1 - lines()[made]
    ended = job.finish() == 0
    found = Sweep(settings.out).frame()
    same = ended and all(equal(one, other) for one, other in zip(found["out"], undisturbed["out"], strict=True))
    return Outcome("node killed under a sweep's trial", ended, same, round(recovered - failed, 1), again)


def host_cut_off(stage: Stage) -> Outcome:
    """A host's network goes down: its processes live, and reach nobody."""
    job = stage.train("plug", replicas=2)
    job.at_step(EVERY + EVERY // 2)
    failed = time.monotonic()
    assert isinstance(stage.nodes, Hosts)
    stage.nodes.cut_off(workers()[0].node_id)
    wait_for("the worker group's end", lambda: "a worker failed" in job.output() or "no step for" in job.output(), job)
    return stage.outcome("host cut off from the network, a spare is there", job, failed, len(job.steps()))


class Tenant:
    """Takes the CPUs of a node."""


def living(pid: int) -> bool:
    """Whether a process has not ended yet."""
    return Path(f"/proc/{pid}/fd").exists()


def chunks(path: Path) -> dict[str, bytes]:
    """Chunk files of both splits."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("chunk_*.hdf5"))}


CASES: dict[str, Callable[[Stage], Outcome]] = {
    case.__name__: case
    for case in (
        worker_killed,
        node_killed_with_spare,
        node_killed_without_spare,
        nodes_missing_at_the_start,
        driver_killed,
        checkpoint_cut,
        store_away,
        worker_hangs,
        model_actor_killed,
        node_killed_under_live_training,
        node_killed_under_a_sweep,
        host_cut_off,
    )
}
ON_HOSTS = ("host_cut_off",)
"""Cases that need nodes with a network between them."""
