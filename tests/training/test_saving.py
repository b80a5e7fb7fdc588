"""Checkpoints written while training goes on: what they hold, when they count, and what becomes of a failure."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tests.runs import Interrupted, final_state, interrupt_at
from tests.training.filesystems import Full, Held
from xlc_ray.activations import store
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards, checkpoint
from xlc_ray.training import loop, train_alone
from xlc_ray.training.saving import Stop

EVERY_STEP = {"train.log_every": 1, "train.keep": 9}


@pytest.fixture
def held():
    Held.released.clear()
    yield Held.released
    Held.released.set()


def after(step, do):
    def announce(metrics):
        if metrics["step"] == step:
            do()

    return announce


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(small_run, tmp_path, held, states):
    shape = {"train.optimizer": {"states": states}, "dictionary.features": 1024}
    config = small_run({**EVERY_STEP, **shape, "out": f"held://{tmp_path.name}"})
    seen = []

    def go_on():
        seen.append(checkpoint.steps(config.out))
        held.set()

    train_alone(config, after(7, go_on))  # three steps after the checkpoint of step 4
    assert seen == [[]]  # no bytes, no checkpoint
    assert checkpoint.steps(config.out) == [4, 8, 12]
    waiting = config.override({"out": f"{tmp_path}/waiting", "train.async_checkpoints": False})
    train_alone(waiting)
    for step in (4, 8, 12):
        want, got = final_state(waiting, step), final_state(config, step)
        assert want.keys() == got.keys()
        for name, value in want.items():
            assert torch.equal(value, got[name]), (step, name)


def test_without_it_training_waits(small_run, tmp_path, held):
    config = small_run({**EVERY_STEP, "out": f"held://{tmp_path.name}", "train.async_checkpoints": False})
    timer, order = threading.Timer(0.3, lambda: (order.append("written"), held.set())), []
    timer.start()
    train_alone(config, after(5, lambda: order.append("step 5")))
    timer.join()
    assert order == ["written", "step 5"]


@pytest.mark.parametrize("step", [8, 12])
def test_a_write_that_fails_ends_the_run_in_a_line_and_costs_only_that_checkpoint(small_run, tmp_path, step):
    config = small_run({**EVERY_STEP, "out": f"full://{tmp_path.name}"})
    Full.refused, steps = f"step_{step}", []
    with pytest.raises(UserError, match=rf"step_{step}: cannot be written: No space left") as error:
        train_alone(config, lambda metrics: steps.append(metrics["step"]))
    assert "\n" not in str(error.value)
    assert step <= steps[-1] <= 12
    assert checkpoint.steps(config.out) == list(range(4, step, 4))
    Full.refused = "nothing"
    train_alone(config)
    whole = config.override({"out": f"{tmp_path}/whole"})
    train_alone(whole)
    want = final_state(whole)
    assert all(torch.equal(value, want[name]) for name, value in final_state(config).items())


def test_a_failure_is_seen_at_a_step_and_not_only_at_the_next_checkpoint():
    def write(_):
        raise OSError(5, "Input/output error")

    def steps(background):
        background.start(write, {})
        for _ in range(1000):
            time.sleep(0.01)
            background.check()

    with checkpoint.Background() as background, pytest.raises(OSError, match="Input/output"):
        steps(background)


def test_an_error_of_training_waits_for_the_bytes(small_run, tmp_path, held):
    config = small_run({**EVERY_STEP, "out": f"held://{tmp_path.name}"})
    timer = threading.Timer(0.3, held.set)
    timer.start()
    with pytest.raises(Interrupted):
        train_alone(config, interrupt_at(5))
    assert checkpoint.steps(config.out) == [4]


@pytest.mark.parametrize("in_background", [True, False])
def test_others_hear_of_every_checkpoint_once_when_it_is_there(small_run, in_background):
    config = small_run({"train.async_checkpoints": in_background, "train.keep": 9})
    loop.prepare(config)
    data, told = store.open_store(config.source.path), []

    def saved(step, metrics):
        assert step in checkpoint.steps(config.out)
        told.append((step, metrics["step"]))

    reader = loop.in_process(config, data, Shards())
    loop.train_rank(config, data, Shards(), reader, torch.device("cpu"), lambda _: None, saved)
    assert told == [(4, 4), (8, 8), (12, 12)]


def test_what_an_interrupted_save_left_is_cleared_away(small_run, tmp_path):
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/step_{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/step_{step}/__0_0.distcp").write_text("half")
    train_alone(small_run({"train.keep": 2}))
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_12", "step_8"]


@pytest.mark.parametrize(("in_background", "kept"), [(True, [4, 8]), (False, [4])])
def test_a_run_that_is_stopped_at_a_checkpoint_loses_no_step(small_run, in_background, kept):
    config = small_run({"train.async_checkpoints": in_background})
    loop.prepare(config)
    data, shards = store.open_store(config.source.path), Shards()
    reader = loop.in_process(config, data, shards)

    def stop(step, metrics):
        raise Stop

    with pytest.raises(Stop):
        loop.train_rank(config, data, shards, reader, torch.device("cpu"), lambda _: None, stop)
    assert checkpoint.steps(config.out) == kept
    train_alone(config)
    whole = config.override({"out": config.out + "_whole"})
    train_alone(whole)
    for name, value in final_state(whole).items():
        assert torch.equal(value, final_state(config)[name]), name
