"""The plan's arithmetic against known answers, against a real dictionary, and the job that prints it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from xlc_ray.config import UserError, load_config
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.build import build, make_wiring
from xlc_ray.training import plan
from xlc_ray.training.forecast import forecast, layouts
from xlc_ray.training.learner import Learner
from xlc_ray.training.machine import GB, GPUS, Machine

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
SLOW = Machine(
    "slow", dict.fromkeys(("float32", "bfloat16", "float64"), 100 * GB), 20 * GB, 10 * GB, GB, GB, 16 * GB, 4
)
WIRINGS = [
    {"kind": "sae"},
    {"kind": "transcoder", "skip": True},
    {"kind": "clt"},
    {"kind": "crosscoder"},
    {"kind": "crosscoder", "causality": "strict"},
]

GATES = [
    {"kind": "topk", "k": 3},
    *({"kind": k} for k in ("jumprelu", "gated", "hard_concrete", "gated_hard_concrete")),
]


def settings(**changes):
    return load_config(QUICKSTART, changes)


def work_of(config, layers=4, width=16, active=None) -> plan.Work:
    return plan.work(config, make_wiring(config.dictionary.wiring, layers, width), active)


@pytest.mark.parametrize("wiring", WIRINGS, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_parameters_and_states_are_those_of_the_real_thing(wiring, gate):
    config = settings(
        **{"dictionary.wiring": wiring, "dictionary.gate": gate, "dictionary.features": 24, "train.loss": {}}
    )
    made = build(config.dictionary, make_wiring(config.dictionary.wiring, 4, 16), 0, Shards())
    load = work_of(config)
    assert load.parameters == sum(p.numel() for p in made.parameters())
    learner = Learner(made, config)
    states = [s for name, s in learner.state().items() if name.startswith("optimizer.") and s.dim()]
    held = plan.memory(load, 1, 1, 1)
    assert held["gradients and optimizer"] == 4 * load.parameters + sum(s.nbytes for s in states)


def test_flops_are_those_of_the_cost_table():
    """A CLT of L layers takes 2LFd to encode and, if dense, (4L + 6N)Fd in all, N = L(L+1)/2; sparse products of k
    active features take 2kd + 6kTd, T = (L+1)/2."""
    layers, width, features, k = 12, 16, 512, 24
    changes = {"dictionary.wiring": {"kind": "clt"}, "dictionary.gate": {"kind": "topk", "k": k}}
    load = work_of(settings(**changes, **{"dictionary.features": features}), layers, width)
    blocks, targets = layers * (layers + 1) / 2, (layers + 1) / 2
    assert load.flops["encode"] == 2 * layers * features * width
    assert load.dense_flops == (4 * layers + 6 * blocks) * features * width
    assert load.flops["sparse"] == pytest.approx(2 * k * width + 6 * k * targets * width)
    assert load.flops["dense"] == 0


def test_products_are_planned_as_they_are_dispatched():
    few, many = ({"dictionary.gate": {"kind": "relu"}, "dictionary.features": 64} for _ in range(2))
    assert all(g.sparse for g in work_of(settings(**few), active=4 * 8).groups)  # exactly at the break-even
    assert not any(g.sparse for g in work_of(settings(**many), active=4 * 9).groups)
    forced = settings(**few, **{"dictionary.products": "dense"})
    assert not any(g.sparse for g in work_of(forced, active=4).groups)
    assert not work_of(settings(**few)).known
    assert work_of(settings()).known


# ---------------------------------------------------------------- penalties that read all pre-activations

FEW = {"kind": "jumprelu", "threshold": 3.0, "bandwidth": 0.5}  # above every pre-activation at the start
TANH = {"sparsity": {"kind": "tanh", "coefficient": 0.1}}
L0 = {"sparsity": {"kind": "l0", "coefficient": 0.1}}
OPEN = {"alpha": -6.0}  # hard-concrete gates: so few are open that products are sparse
PENALISED = [
    (FEW, TANH, 0),
    (FEW, L0, 0),
    (FEW, TANH | {"preactivation": 1e-3}, 2),
    ({"kind": "hard_concrete", **OPEN}, L0, 2),
    ({"kind": "gated_hard_concrete", **OPEN}, L0, 3),
    ({"kind": "hard_concrete", "input_dependent": False, **OPEN}, L0, 0),
]


def penalised(gate, loss, products="sparse"):
    """A CLT of 4 layers of 16 with 512 features each, 128 tokens a batch, 64 features a token in products."""
    changes = {"dictionary.wiring": {"kind": "clt"}, "dictionary.gate": gate, "dictionary.features": 512}
    return settings(**changes, **{"train.loss": loss, "train.batch_tokens": 128, "dictionary.products": products})


def step_of(config) -> tuple[float, float]:
    """Of a real step: FLOPs of its dense products, and bytes that it holds at once, at most."""
    wires = make_wiring(config.dictionary.wiring, 4, 16)
    learner = Learner(build(config.dictionary, wires, 0, Shards()), config)
    batch = {s: torch.randn(128, 16, generator=torch.Generator().manual_seed(0)) for s in wires.sites}
    learner.train_step(batch, False)
    with FlopCounterMode(display=False) as counter:
        learner.train_step(batch, False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        learner.train_step(batch, False)
    results: Any = watched.profiler
    found = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return counter.get_total_flops(), most


@pytest.mark.parametrize(("gate", "loss", "arrays"), PENALISED, ids=str)
def test_a_penalty_on_all_pre_activations_costs_a_dense_gradient(gate, loss, arrays):
    """2 F R, of which the plan is that of a real step; [B, F] arrays of 4 bytes, of which it is close."""
    config, F, R, B = penalised(gate, loss), 4 * 512, 16, 128
    load = work_of(config, active=64)
    assert load.flops["encode"] == 2 * F * R
    assert load.flops["dense"] == (2 * F * R if arrays else 0)
    real, bytes_held = step_of(config)
    assert real == B * (load.flops["encode"] + load.flops["dense"])
    held = plan.memory(replace(load, begins_dense=False), 1, 1, 1)
    assert held.get("pre-activations", 0) == arrays * 4 * B * F
    if arrays:
        assert arrays * 4 * B * F < bytes_held < (arrays + 1.5) * 4 * B * F
    elif gate == FEW:
        assert bytes_held < 1.5 * 4 * B * F


def test_dense_products_share_the_pre_activations_of_a_penalty():
    """They make all anyway: 2R + 3W a feature, doubled, and one [B, F] array more instead of two."""
    config = penalised(FEW, TANH | {"preactivation": 1e-3}, "dense")
    load = work_of(config)
    assert sum(load.flops.values()) == load.dense_flops == 2 * 512 * (4 * 2 * 16 + 3 * (64 + 48 + 32 + 16))
    assert step_of(config)[0] == 128 * load.dense_flops
    assert plan.memory(load, 1, 1, 1)["pre-activations"] == 4 * 128 * 4 * 512


def test_a_penalty_takes_time():
    free, bound = (work_of(penalised(FEW, TANH | {"preactivation": p}), active=64) for p in (0.0, 1e-3))
    found = [plan.predict(load, SLOW, "float32", 1, 1) for load in (free, bound)]
    more = 2 * 2048 * 16 * 128 / (100 * GB), 19 * 4 * 2048 * 128 / (10 * GB)
    assert found[1].seconds - found[0].seconds == pytest.approx(sum(more))


# ---------------------------------------------------------------- products of more than the active features


def test_what_products_of_jumprelu_take_in_is_not_known():
    """Neither a target of l0 nor a guess says it: dense, unless somebody does."""
    gate = {"dictionary.gate": {"kind": "jumprelu"}, "dictionary.features": 1024}
    config = settings(**gate, **{"train.loss": {"sparsity": L0["sparsity"] | {"target_l0": 32}}})
    load, told = work_of(config), work_of(config, active=256)
    assert not load.known
    assert load.active == [1024] * 4
    step = plan.memory(load, 1, 1, 1)  # dense products list no entries: "features" are tiles of selection alone
    assert step["features"] == 3 * 4 * load.tokens * 1024
    assert not any(g.sparse for g in load.groups)
    assert told.known
    assert told.active == [64] * 4
    assert all(g.sparse for g in told.groups)


@pytest.mark.parametrize(
    ("products", "gate", "dense"),
    [
        ("auto", {"kind": "jumprelu"}, True),
        ("auto", {"kind": "relu"}, True),
        ("sparse", {"kind": "relu"}, False),
        ("auto", {"kind": "topk", "k": 16}, False),
    ],
)
def test_memory_is_that_of_the_first_steps(products, gate, dense):
    """Which are dense without a budget: 4 arrays [B, F] of 4 bytes."""
    changes = {"dictionary.gate": gate, "dictionary.features": 1024, "dictionary.products": products}
    config = settings(**changes, **{"train.batch_tokens": 64})
    load = work_of(config, active=16)
    assert all(g.sparse for g in load.groups)
    assert plan.memory(load, 1, 1, 1)["dense features"] == (4 * 4 * 64 * 4 * 1024 if dense else 0)


# ---------------------------------------------------------------- moments and checkpoints


@pytest.mark.parametrize(("features", "width"), [(4096, 16), (512, 16), (130, 12)])
def test_moments_of_8_bits_take_what_they_really_take(features, width):
    """2 + 8/256 bytes a value, but 8 in tensors of under 4,096 or not of whole blocks; the two maps of 256 values that
    each tensor names are not counted."""
    config = settings(
        **{
            "dictionary.wiring": {"kind": "clt"},
            "dictionary.features": features,
            "train.optimizer": {"states": "int8"},
            "train.loss": {},
        }
    )
    made = build(config.dictionary, make_wiring(config.dictionary.wiring, 4, width), 0, Shards())
    learner, load = Learner(made, config), work_of(config, 4, width)
    learner.state()
    real = 0
    for state in learner.optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            parts = (moment.codes, moment.scale) if hasattr(moment, "codes") else (moment,)
            real += sum(part.nbytes for part in parts)
    assert load.moments(load.parameters, 1) == real
    if features == 4096:  # all but b_dec [4 width] in blocks
        assert real == 2.03125 * (load.parameters - 4 * width) + 8 * 4 * width


def test_where_a_checkpoint_is_taken_moments_are_unpacked():
    """8 bytes a parameter, if that is more than what a step holds; it does not if the batch is large."""
    wide = {"dictionary.features": 4096, "train.optimizer": {"states": "int8"}}
    load = work_of(settings(**wide, **{"train.batch_tokens": 8}), 4, 256)
    held = plan.memory(load, 1, 1, 1)
    assert held["moments unpacked"] == 8 * load.parameters
    assert "batch" not in held
    assert held["gradients and optimizer"] / load.parameters == pytest.approx(4 + 2.03125, rel=1e-3)
    many = replace(load, tokens=10**7)
    assert "moments unpacked" not in plan.memory(many, 1, 1, 1)
    assert "batch" in plan.memory(many, 1, 1, 1)


def test_checkpoints_are_written_from_a_copy_of_12_bytes_a_parameter():
    """Of the rank's own memory where that is the host's; twice as many in float64; half of it on each of two ranks."""
    load = work_of(settings())
    for host in (False, True):
        more = sum(plan.memory(load, 2, 1, 1, host).values()) - sum(plan.memory(load, 2, 1, 1).values())
        assert more == pytest.approx(12 * -(-load.parameters // 2) if host else 0)
    assert load.copy(1) == 12 * load.parameters
    assert work_of(settings(**{"train.precision": "float64"})).copy(1) == 24 * load.parameters
    waiting = work_of(settings(**{"train.async_checkpoints": False}))
    assert waiting.copy(1) == 0
    assert plan.memory(waiting, 1, 1, 1, host=True) == plan.memory(waiting, 1, 1, 1)


# ---------------------------------------------------------------- time and layouts


@pytest.mark.parametrize(
    ("tokens", "change", "expected"),
    [(1024, {}, "arithmetic"), (8, {}, "optimizer"), (1024, {"link": 1e-4 * GB}, "communication")],
)
def test_what_is_slowest_binds(tokens, change, expected):
    features = {"dictionary.features": 4096, "dictionary.gate": {"kind": "topk", "k": 32}}
    load = work_of(settings(**features, **{"train.batch_tokens": tokens}))
    found = plan.predict(load, replace(SLOW, **change), "float32", tensor_parallel=2, replicas=1)
    assert found.binds == expected


def test_reading_binds_only_where_it_is_slower_than_the_step():
    load = work_of(settings())
    alone = plan.predict(load, SLOW, "float32", 1, 1)
    fed = plan.predict(load, SLOW, "float32", 1, 1, data=plan.DATA_RATE * 10 * alone.seconds / load.tokens)
    assert alone.binds != "data"
    assert fed.binds == "data"
    assert fed.seconds == pytest.approx(10 * alone.seconds)


def test_only_ranks_that_share_work_speak():
    load = work_of(settings())
    assert plan.predict(load, SLOW, "float32", 1, 1).communication == 0
    halves = plan.predict(load, SLOW, "float32", tensor_parallel=2, replicas=1)
    assert halves.communication == pytest.approx(load.tokens * load.written * 4 / SLOW.link)
    copies = plan.predict(load, SLOW, "float32", tensor_parallel=1, replicas=2)
    assert copies.communication == pytest.approx(load.parameters * 4 / SLOW.link)
    assert halves.encode == pytest.approx(plan.predict(load, SLOW, "float32", 1, 1).encode / 2)


def test_layouts_that_fit_come_fastest_first():
    config = settings(**{"train.batch_tokens": 1024})
    found = layouts(config, work_of(config), SLOW, 4, 0.0)
    assert {(each.tensor_parallel, each.replicas) for each in found} == {(1, 4), (2, 2), (4, 1)}
    assert [f.prediction.seconds for f in found] == sorted(f.prediction.seconds for f in found)


def test_why_nothing_fits():
    config = settings(**{"dictionary.features": 2**24, "train.batch_tokens": 1023, "train.accumulate": 1})
    with pytest.raises(UserError) as error:
        layouts(config, work_of(config), SLOW, 8, 0.0)
    text = str(error.value)
    assert "\n" not in text
    assert "no layout fits 8 x slow" in text
    assert "tp 8 would leave the node of 4" in text
    assert "do not divide train.batch_tokens = 1023" in text


def test_a_rank_that_is_too_large_says_how_large():
    config = settings(**{"dictionary.features": 2**24, "train.batch_tokens": 1024})
    with pytest.raises(UserError, match=r"tp 4 needs [\d.]+ of 14\.7 GB a rank"):
        layouts(config, work_of(config), SLOW, 4, 0.0)


def test_the_roofline_is_below_every_prediction():
    """What cannot be avoided takes no longer than what is predicted of this implementation."""
    for layers, width, features, k in ((12, 768, 6144, 192), (4, 128, 1024, 32), (4, 256, 16384, 64)):
        changes = {"dictionary.features": features, "dictionary.gate": {"kind": "batchtopk", "k": k}}
        load = work_of(settings(**changes), layers, width)
        for device in (SLOW, *GPUS.values()):
            assert (
                sum(plan.roofline(load, device, "bfloat16").values())
                < plan.predict(load, device, "bfloat16", 1, 1).seconds
            )


# ---------------------------------------------------------------- in words


def lines_of(config, gpu=None, nodes=1, active=None) -> list[str]:
    return list(forecast(config, gpu, nodes, active))


def test_the_forecast_says_what_a_user_asks(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = "\n".join(lines_of(settings(), "h100"))
    load = work_of(settings(), 4, 128)
    assert f"{load.parameters / 1e6:,.1f}M parameters" in text
    config = settings()
    stored = 2 * 4 * 2 * 128  # bytes of bfloat16, layers, sites of a layer, width
    tokens = config.generate.tokens + config.generate.held_out_tokens
    assert f"{tokens:,} tokens of {stored:,} bytes" in text
    assert "tp 1 x 8 replicas" in text
    assert "tp 8 x 1 replicas" in text
    assert "binds" in text


def test_the_forecast_says_what_is_not_as_usual(monkeypatch):
    monkeypatch.chdir(ROOT)
    usual = "\n".join(lines_of(settings(**{"train.async_checkpoints": False}), "h100"))
    assert not any(line in usual for line in ("penalty ", "memory  ", "moments  ", "checkpoints  ", "--active"))
    changes = {"dictionary.gate": {"kind": "jumprelu"}, "dictionary.features": 8192}
    loss = {"train.loss": TANH | {"preactivation": 3e-6}, "train.optimizer": {"states": "int8"}}
    config = settings(**changes, **loss)
    text = "\n".join(lines_of(config, "h100"))
    assert "products      of 32,768 features a token at most: those above the threshold and half a bandwidth" in text
    assert "sparse in no groups" in text
    assert "penalty       reads all pre-activations" in text
    assert "moments       2.04 bytes a parameter, and 8 more while a checkpoint is taken" in text
    copy = 12 * work_of(config, 4, 128).parameters / GB
    assert f"a copy of {copy:,.1f} GB a replica in host memory, beside the ranks below" in text
    told = "\n".join(lines_of(config, "h100", active=256))
    assert "of 256 features a token (--active), those above the threshold" in told
    assert "sparse in all groups" in told
    assert "memory        of dense features" in told


def test_a_live_source_takes_memory_and_the_disk_of_its_sample(monkeypatch):
    monkeypatch.chdir(ROOT)
    live = {"kind": "live", "path": "data/live", "sample_tokens": 1000, "held_chunks": 10}
    config = settings().override({"source": live, "generate.tokens": 10**9, "generate.chunk_tokens": 10**6})
    text = "\n".join(lines_of(config, "h100"))
    assert f"{1000 + config.generate.held_out_tokens:,} tokens of " in text
    assert f"live          {10 * 1e6 * 2 * 4 * 2 * 128 / 1e9:,.1f} GB of chunks in the object store" in text
    kept = config.override({"source": live | {"tee": "data/live"}})
    assert f"{10**9 + config.generate.held_out_tokens:,} tokens of " in "\n".join(lines_of(kept, "h100"))


def test_the_sites_of_a_base_model_take_disk_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "configs/tiny_model_diff.yaml"))
    assert " tokens of 512 bytes" in "\n".join(forecast(config, "h100", 1, None))  # 2 models x 128 x bfloat16
    both = config.override({"generate.sites": ["mlp_in.0", "mlp_in.0@base", "mlp_in.1@base"]})
    assert " tokens of 768 bytes" in "\n".join(forecast(both, "h100", 1, None))


@pytest.mark.parametrize(
    ("gpu", "nodes", "message"),
    [
        ("h1000", 1, r"--gpu: 'h1000' is not known; allowed: h100, h200, a100, l40s"),
        ("h100", 0, r"--nodes: 0; allowed: 1 or more"),
        (None, 2, r"--nodes: 2; allowed: 1 without --gpu"),
    ],
)
def test_what_cannot_be_planned_is_one_line(gpu, nodes, message):
    with pytest.raises(UserError, match=message):
        lines_of(settings(), gpu, nodes)


def test_a_dictionary_beyond_this_machine_says_what_to_do(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"do not fit into .* make dictionary.features or train.batch_tokens smaller"):
        lines_of(settings(**{"dictionary.features": 2**26}))


def test_the_job_prints_the_plan_of_this_machine():
    done = subprocess.run(
        [sys.executable, "jobs/plan.py", "--config", QUICKSTART, "--dictionary.features=2048"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "4 groups of 2,048 features" in done.stdout
    assert "tokens/s" in done.stdout.splitlines()[-1]


def test_the_job_refuses_in_one_line():
    done = subprocess.run(
        [sys.executable, "jobs/plan.py", "--config", QUICKSTART, "--gpu", "tpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["error: --gpu: 'tpu' is not known; allowed: h100, h200, a100, l40s"]


@pytest.mark.parametrize("active", [0.0, -5.0, float("nan"), float("inf")])
def test_a_number_of_active_features_that_cannot_be_is_one_line(active):
    with pytest.raises(UserError, match=r"--active: .*; allowed: a number of features above 0"):
        list(forecast(settings(), "h100", 1, active))


def test_what_training_would_refuse_is_refused_by_its_plan():
    with pytest.raises(UserError, match=r"dictionary\.gate\.k: 99999 exceeds"):
        list(forecast(settings(**{"dictionary.gate.k": 99999}), "h100", 1, None))
    with pytest.raises(UserError, match="mlp_inn"):
        list(forecast(settings(**{"dictionary.wiring": {"kind": "sae", "site": "mlp_inn"}}), "h100", 1, None))
    with pytest.raises(UserError, match="foo"):
        list(forecast(settings(**{"generate.sites": ["foo.0"]}), "h100", 1, None))
