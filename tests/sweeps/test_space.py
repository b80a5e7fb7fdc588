"""Which trials a space holds: order, conditions, draws, names, and what is refused before anything runs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.tree import ROOT
from tests.sweeps.make import sweep
from xlc_ray.config import UserError, load_config
from xlc_ray.sweeps import space
from xlc_ray.sweeps.names import LONGEST

BASE = load_config(ROOT / "configs/quickstart.yaml").model_dump(mode="json")
GATES = {
    "dictionary.gate": {"choice": [{"kind": "topk", "k": 8}, {"kind": "batchtopk", "k": 8}, {"kind": "relu"}]},
    "dictionary.gate.k": {"choice": [8, 16], "when": {"dictionary.gate.kind": ["topk", "batchtopk"]}},
}


def changes(**sections):
    return [trial.changes for trial in space.trials(sweep(BASE, **sections))]


def test_a_grid_is_nested_loops_in_the_order_of_the_file():
    found = changes(space={"train.lr": {"choice": [0.1, 0.2]}, "seed": {"grid": [3, 1, 2]}})
    assert [(c["train.lr"], c["seed"]) for c in found] == [(0.1, 3), (0.1, 1), (0.1, 2), (0.2, 3), (0.2, 1), (0.2, 2)]


def test_cases_are_outermost_and_set_what_belongs_together():
    cases = [{"train.lr": 0.1, "train.batch_tokens": 512}, {"train.lr": 0.2}]
    found = changes(cases=cases, space={"seed": {"choice": [0, 1]}})
    assert found == [case | {"seed": seed} for case in cases for seed in (0, 1)]


def test_a_conditional_axis_varies_only_where_it_applies():
    trials = space.trials(sweep(BASE, space=GATES))
    gates = [(t.config.dictionary.gate.kind, getattr(t.config.dictionary.gate, "k", None)) for t in trials]
    assert gates == [("topk", 8), ("topk", 16), ("batchtopk", 8), ("batchtopk", 16), ("relu", None)]
    assert [t.name for t in trials] == ["topk,k=8", "topk,k=16", "batchtopk,k=8", "batchtopk,k=16", "relu"]


def test_a_condition_may_ask_for_a_default():
    gates = [{"kind": "batchtopk", "k": 8}, {"kind": "batchtopk", "k": 8, "pool": "group"}, {"kind": "topk"}]
    axes = {
        "dictionary.gate": {"choice": gates},
        "dictionary.gate.k": {"choice": [4, 6], "when": {"dictionary.gate.kind": "topk"}},
        "train.lr": {"choice": [0.1, 0.2], "when": {"dictionary.gate.pool": "all"}},
    }
    found = [(t.config.dictionary.gate.k, t.changes.get("train.lr")) for t in space.trials(sweep(BASE, space=axes))]
    assert found == [(8, 0.1), (8, 0.2), (8, None), (4, 0.1), (4, 0.2), (6, 0.1), (6, 0.2)]


def test_an_axis_that_applies_nowhere_is_refused():
    axes = GATES | {"train.lr": {"choice": [0.1, 0.2], "when": {"dictionary.gate.kind": "gated"}}}
    with pytest.raises(UserError, match=r"space\.train\.lr\.when: \{'dictionary\.gate\.kind': 'gated'\} holds nowhere"):
        changes(space=axes)
    between = {"dictionary.gate.k": {"randint": [1, 4]}}
    between["train.lr"] = {"choice": [0.1], "when": {"dictionary.gate.k": 2}}
    assert len(changes(space=between, search={"kind": "random", "num_samples": 4})) == 4, "it may apply to a draw"


def test_what_hangs_on_what_hangs_on_a_range_may_apply_to_a_draw():
    axes = {"dictionary.gate.k": {"randint": [1, 3]}}
    axes["dictionary.features"] = {"choice": [64, 128], "when": {"dictionary.gate.k": 2}}
    axes["train.lr"] = {"choice": [0.1, 0.2], "when": {"dictionary.features": 64}}
    found = changes(space=axes, search={"kind": "random", "num_samples": 5})
    assert {len(c) for c in found} == {1, 2, 3}
    never = {"choice": [1], "when": {"dictionary.wiring.kind": "sae"}}
    with pytest.raises(UserError, match="holds nowhere"):
        changes(space=axes | {"seed": never}, search={"kind": "random", "num_samples": 5})


def test_the_first_trials_are_kept():
    axes = {"train.lr": {"choice": [0.1, 0.2]}, "seed": {"choice": list(range(50))}}
    assert changes(space=axes, search={"max_trials": 3}) == changes(space=axes)[:3]


def test_every_trial_is_a_run_of_its_own_below_the_sweep():
    trials = space.trials(
        sweep(BASE, space={"train.lr": {"choice": [0.1, 0.2]}}, override={"train.wandb.project": "p"})
    )
    assert [t.config.out for t in trials] == ["runs/sweep/trials/lr=0.1", "runs/sweep/trials/lr=0.2"]
    assert {t.config.train.wandb.group for t in trials} == {"sweep"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.floats(1e-6, 1.0), st.floats(1.01, 1e4), st.sampled_from(["uniform", "loguniform"]))
def test_draws_stay_within_their_range(seed, low, factor, kind):
    axes = {"train.lr": {kind: [low, low * factor]}, "train.batch_tokens": {"randint": [2, 5]}}
    one = sweep(BASE, space=axes, search={"kind": "random", "num_samples": 4, "seed": seed})
    found = space.trials(one)
    assert len(found) == 4
    assert all(low <= t.config.train.lr <= low * factor for t in found)
    assert {t.config.train.batch_tokens for t in found} <= {2, 3, 4, 5}


def test_draws_repeat_with_their_seed_and_more_samples_continue_them():
    axes = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "seed": {"choice": [1, 2]}}

    def draw(number, seed):
        return changes(space=axes, search={"kind": "random", "num_samples": number, "seed": seed})

    assert draw(3, 0) == draw(8, 0)[:3] != draw(3, 1)
    logs = [math.log10(c["train.lr"]) for c in draw(300, 0)]
    assert sum(log < -2.5 for log in logs) / 300 == pytest.approx(0.5, abs=0.1)


def test_a_sample_runs_once_at_every_point_of_the_grid_axes():
    axes = {"train.lr": {"loguniform": [1e-4, 1e-1]}, "seed": {"grid": [1, 2, 3]}}
    found = changes(space=axes, search={"kind": "random", "num_samples": 4})
    assert [c["seed"] for c in found] == [1, 2, 3] * 4
    assert len({c["train.lr"] for c in found}) == 4


@pytest.mark.parametrize("first", ["seed", "train.lr"])
def test_a_sample_is_the_same_at_all_points_whichever_axis_stands_first(first):
    both = {"seed": {"grid": [1, 2, 3]}, "train.lr": {"loguniform": [1e-4, 1e-1]}}
    axes = {first: both[first]} | both
    found = changes(space=axes, search={"kind": "random", "num_samples": 4})
    assert [c["seed"] for c in found] == [1, 2, 3] * 4
    assert [c["train.lr"] for c in found] == [lr for lr in [c["train.lr"] for c in found[::3]] for _ in range(3)]
    assert len({c["train.lr"] for c in found}) == 4


def test_draws_whose_settings_do_not_fit_together_are_passed_over():
    axes = {"train.batch_tokens": {"randint": [36, 44]}}
    two = {"cluster.replicas": 2}
    found = changes(space=axes, override=two, search={"kind": "random", "num_samples": 5})
    assert sorted(c["train.batch_tokens"] for c in found) == [36, 38, 40, 42, 44]
    with pytest.raises(
        UserError, match=r"holds 5 different points; space: train\.batch_tokens=\d+: train\.batch_tokens: "
    ):
        changes(space=axes, override=two, search={"kind": "random", "num_samples": 6})


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_a_range_of_fractions_for_a_whole_number_is_refused(kind):
    one = sweep(BASE, space={"dictionary.features": {kind: [64, 128]}}, search={"kind": "optuna", "num_samples": 1})
    with pytest.raises(
        UserError, match=rf"space\.dictionary\.features: {kind} gives fractions.*allowed: randint, choice$"
    ):
        space.corners(one)


def test_random_choices_do_not_repeat_and_say_when_the_space_is_used_up():
    axes = {"train.lr": {"choice": [0.1, 0.2]}, "seed": {"choice": [1, 2]}}
    found = changes(space=axes, search={"kind": "random", "num_samples": 4})
    assert len({tuple(c.items()) for c in found}) == 4
    with pytest.raises(UserError, match="num_samples: 5, but the space holds 4 different points"):
        changes(space=axes, search={"kind": "random", "num_samples": 5})


def test_two_points_of_the_same_settings_are_refused():
    same = [{"train.lr": 0.1}, {"train.lr": 0.1, "seed": BASE["seed"]}]
    with pytest.raises(UserError, match="repeats the settings"):
        changes(cases=same)


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        ("train.log_every", 1, 2),
        ("train.keep", 1, 2),
        ("source.verify", False, True),
        ("train.wandb", None, {"project": "p"}),
    ],
)
def test_two_points_that_differ_in_nothing_that_decides_the_result_are_refused(path, one, other):
    with pytest.raises(UserError, match="repeats the settings"):
        changes(space={path: {"choice": [one, other]}})


def test_where_a_trial_runs_and_how_it_is_measured_sets_it_apart():
    assert len(changes(space={"cluster.replicas": {"choice": [1, 2]}})) == 2
    assert len(changes(space={"evaluate.tokens": {"choice": [100, 200]}})) == 2


def test_a_grid_point_that_cannot_run_is_one_line_with_the_point():
    with pytest.raises(UserError, match=r"space: dictionary\.gate\.k=4096: dictionary\.gate") as error:
        changes(space={"dictionary.gate.k": {"choice": [8, 4096]}}, override={"dictionary.gate.pool": "group"})
    assert "\n" not in str(error.value)


def test_corners_are_all_combinations_of_ends_and_choices():
    axes = {"train.lr": {"uniform": [0.1, 0.2]}, "cluster.tensor_parallel": {"randint": [1, 2048]}}
    one = sweep(BASE, space={"train.lr": axes["train.lr"]}, search={"kind": "random", "num_samples": 1})
    assert [t.config.train.lr for t in space.corners(one)] == [0.1, 0.2]
    with pytest.raises(UserError, match=r"train\.lr=0\.1, cluster\.tensor_parallel=2048: cluster\.tensor_parallel"):
        space.corners(sweep(BASE, space=axes, search={"kind": "random", "num_samples": 1}))


def test_names_tell_trials_apart():
    axes = {
        "dictionary.gate": {"choice": [{"kind": "topk", "k": 8}, {"kind": "topk", "k": 16}, {"kind": "relu"}]},
        "train.lr_schedule.warmup": {"choice": [0.0, 0.1]},
        "train.optimizer.betas": {"choice": [[0.9, 0.99], [0.8, 0.9]]},
    }
    names = [t.name for t in space.trials(sweep(BASE, space=axes))]
    assert names[0] == "topk,k=8,warmup=0,betas=0.9+0.99"
    assert names[-1] == "relu,warmup=0.1,betas=0.8+0.9"
    assert len(set(names)) == 12
    assert all(len(name) <= LONGEST for name in names)


def test_a_name_does_not_depend_on_how_many_others_there_are():
    one = sweep(BASE, space={"train.lr": {"choice": [0.1, 0.1 + 1e-9, 0.1 + 2e-9]}})
    names = [t.name for t in space.trials(one)]
    assert names[0] == "lr=0.1"
    assert len(set(names)) == 3
    assert [[t.name for t in space.trials(one, limit)] for limit in (1, 2)] == [names[:1], names[:2]]


def test_cases_are_named_by_their_workers_where_nothing_else_tells_them_apart():
    def named(*cases):
        return [t.name for t in space.trials(sweep(BASE, cases=cases))]

    two = {"cluster.tensor_parallel": 4}
    assert named({"train.lr": 0.1}, {"train.lr": 0.1, **two}) == ["base", "tensor_parallel=4"]
    assert named({"train.lr": 0.1}, {"train.lr": 0.2, **two}) == ["lr=0.1", "lr=0.2"]


def test_names_that_would_be_equal_or_too_long_get_a_hash():
    close = space.trials(sweep(BASE, space={"train.lr": {"choice": [0.1, 0.1 + 1e-9]}}))
    assert len({t.name for t in close}) == 2
    path = {"generic/" * 30: 1}
    gates = [{"kind": "custom", "path": "a:b", "options": o} for o in (path, {**path, "x": 2})]
    long = space.trials(sweep(BASE, space={"dictionary.gate": {"choice": gates}}))
    assert len({t.name for t in long}) == 2
    assert all(len(t.name) <= LONGEST and "/" not in t.name for t in long)
