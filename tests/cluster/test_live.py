"""Live training ends with the parameters of training on the stored chunks, whatever is killed, stopped or slow."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from tests.cluster.prepared import BATCH, LIVE, SITES, STORED, alive, copy_sample, settings_of
from tests.cluster.test_generate import contents
from tests.cluster.test_train import assert_same
from xlc_ray.activations import source, store
from xlc_ray.cluster import live
from xlc_ray.cluster.generate import generate
from xlc_ray.cluster.train import train
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.training import train_alone
from xlc_ray.training.loop import order_for

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def stored(cluster, tmp_path_factory):
    """Settings of training on everything stored, which generation has made."""
    config = settings_of(tmp_path_factory.mktemp("stored"))
    generate(config)
    return config.override({"source": {**STORED, "path": config.source.path}})


@pytest.fixture(scope="module")
def reference(stored):
    """What training on the store gives."""
    train_alone(stored)
    return stored


@pytest.fixture
def prepared(stored, tmp_path):
    """Settings of live training whose text, held-out part and sample, two chunks, are there."""
    here = copy_sample(stored.source.path, tmp_path / "live")
    return settings_of(tmp_path, {"source": {**LIVE, "path": str(here)}})


def language_models() -> list[int]:
    return alive("Harvesting")


def asked(config, replica=0, replicas=1):
    """The handle and the batches of a replica, of all steps."""
    data = store.open_source(config.source)
    with live.generating(config, data, SITES) as generators:
        order = order_for(config, data.chunk_rows)
        share = source.Share(BATCH, 0, config.train.steps, replica, replicas)
        yield generators, live.live_batches(generators, "1", data, order, SITES, share)


def expected(stored, config, replica=0, replicas=1):
    data = store.open_source(stored.source)
    order = order_for(stored, data.chunk_rows)
    return source.batches(data, order, SITES, source.Share(BATCH, 0, config.train.steps, replica, replicas))


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(one[site], other[site]) for site in SITES)


def test_a_slow_trainer_holds_no_more_than_the_bound_and_gets_the_batches_of_a_store(stored, prepared):
    config = prepared.override({"cluster.model_actors": 2})
    for generators, batches in asked(config):
        first = next(batches)
        for _ in range(200):  # what may be made ahead is made, then nothing more
            facts = ray.get(generators.facts.remote())
            if facts["made"] + facts["read"] == LIVE["held_chunks"]:
                break
            time.sleep(0.1)
        time.sleep(1)
        facts = ray.get(generators.facts.remote())
        assert facts["made"] + facts["read"] == facts["most_held"] == LIVE["held_chunks"]
        assert facts["read"] == 2  # the sample
        assert_equal([first, *batches], expected(stored, config))
        facts = ray.get(generators.facts.remote())
        assert facts["most_held"] == LIVE["held_chunks"]
        assert facts["most_models"] <= 2
        # 7,000 rows: an epoch of 6,000 distinct ones, and the first chunks once more.
        assert len(store.open_source(config.source).chunk_rows) == 24
        assert 24 < facts["made"] + facts["read"] <= 24 + LIVE["held_chunks"] + 4


def test_a_slow_generator_is_waited_for(stored, prepared):
    for _, batches in asked(prepared):
        found = [next(batches) for _ in range(20)]  # of more than the sample
        (pid,) = language_models()
        os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(3, os.kill, (pid, signal.SIGCONT))
        timer.start()
        began = time.monotonic()
        found += batches
        assert time.monotonic() - began > 2
        timer.join()
        assert_equal(found, expected(stored, prepared))


def test_replicas_share_each_batch_each_in_a_process_of_its_own(stored, prepared):
    data = store.open_source(prepared.source)

    @ray.remote(num_cpus=0)
    def read(generators, replica):
        order, share = order_for(prepared, data.chunk_rows), source.Share(BATCH, 0, prepared.train.steps, replica, 2)
        return list(live.live_batches(generators, "1", data, order, SITES, share))

    with live.generating(prepared, data, SITES) as generators:
        found = ray.get([read.remote(generators, replica) for replica in (0, 1)])
    for replica in (0, 1):
        assert_equal(found[replica], expected(stored, prepared, replica, 2))


@pytest.mark.slow
def test_killed_language_models_change_nothing_and_tee_leaves_the_store_of_generation(reference, prepared):
    path = prepared.source.path
    config = prepared.override(
        {"source": {**LIVE, "tee": path}, "cluster.tensor_parallel": 2, "cluster.model_actors": 2}
    )
    killed, over = [], threading.Event()

    def kill_twice():
        for written in (4, 12):
            while not over.is_set():
                if len(list(Path(path, "records").iterdir())) >= written and (models := language_models()):
                    os.kill(models[0], signal.SIGKILL)
                    killed.append(models[0])
                    break
                time.sleep(0.01)

    killer = threading.Thread(target=kill_twice)
    killer.start()
    train(config)
    over.set()
    killer.join()
    assert killed
    assert_same(config, reference)
    assert contents(path) == contents(reference.source.path)
    again = store.open_store(path)
    again.verify()
    assert again.manifest == store.open_store(reference.source.path).manifest
    found, wanted = (store.open_store(p).statistics() for p in (path, reference.source.path))
    assert all(np.array_equal(found[site].mean, wanted[site].mean) for site in SITES)
    # The same run once more, elsewhere, finds all chunks stored and needs no language model.
    train(config.override({"out": config.out + "_again"}))
    assert not language_models()


def train_and_kill(config, name: str, checkpoints: int):
    """Train, and once so many checkpoints are there kill a process of the actors with that name."""

    def kill():
        while len(checkpoint.steps(config.out)) < checkpoints:
            time.sleep(0.02)
        os.kill(alive(name)[0], signal.SIGKILL)
        killed.set()

    killed = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    train(config)
    killer.join()
    assert killed.is_set()


@pytest.mark.slow
def test_a_killed_worker_goes_on_at_the_right_text(reference, prepared):
    config = prepared.override({"cluster.replicas": 2})
    train_and_kill(config, "RayTrainWorker", checkpoints=1)
    assert_same(config, reference)
    assert not list(Path(config.source.path).glob("chunk_2.hdf5")), "nothing but the sample is stored"
    assert not language_models()


@pytest.mark.slow
def test_the_actor_that_holds_the_chunks_is_killed_and_training_goes_on(reference, prepared, capfd):
    config = prepared.override({"cluster.replicas": 2, "cluster.hang_timeout_s": 3600})
    train_and_kill(config, "Generators", checkpoints=2)  # past the chunks that are held at the beginning
    assert_same(config, reference)
    assert "the actor that held the chunks of live training died" in capfd.readouterr().out


def test_what_a_language_model_cannot_do_reaches_the_user(prepared):
    path = Path(prepared.source.path, "text/chunk_9.npz")
    path.unlink()
    for _, batches in asked(prepared):
        with pytest.raises(ray.exceptions.RayError, match="chunk_9") as error:
            list(batches)
        assert live_mistake(error.value).startswith(f"{path}: missing")
        break


def live_mistake(error) -> str:
    from xlc_ray.cluster.cli import find_user_error

    return str(find_user_error(error))


def test_fewer_chunks_than_a_window_mixes_are_refused(prepared):
    few = prepared.override({"source": {**LIVE, "path": prepared.source.path, "held_chunks": 2}})
    with pytest.raises(UserError, match=r"source\.held_chunks: 2 are fewer than the \d+ that source\.mix_chunks = 3"):
        live.check(few, store.open_source(few.source))


def test_nothing_prepared_names_the_way(cluster, prepared, tmp_path):
    with pytest.raises(UserError, match="text, held-out part or sample are missing") as error:
        train(prepared.override({"source": {**LIVE, "path": str(tmp_path / "nowhere")}}))
    assert "jobs/generate.py" in str(error.value)


def test_a_sample_can_be_completed_to_a_store(stored, prepared):
    config = prepared.override({"source": {**STORED, "path": prepared.source.path}})
    assert generate(config)["made"] == 22
    assert contents(config.source.path) == contents(stored.source.path)
    assert replace(store.open_store(config.source.path), path="") == replace(
        store.open_store(stored.source.path), path=""
    )
