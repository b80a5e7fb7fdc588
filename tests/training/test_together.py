"""Several runs on one stream are what each is alone, bit for bit, and cost one read; those that leave cost nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.runs import final_state, make_store, settings_in
from xlc_ray.activations import source
from xlc_ray.activations.store import Store, open_store
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.checkpoint import steps
from xlc_ray.training import Diverged, logs, loop, train_alone
from xlc_ray.training.together import Run, Together, stream

CPU = torch.device("cpu")
RUNS = {
    "batchtopk": {},
    "shorter": {"train.steps": 9, "train.accumulate": 2},
    "topk": {"dictionary.gate": {"kind": "topk", "k": 2}, "train.lr": 0.003},
    "resampled": {"train.resample": {"every": 5, "tokens": 60}, "dictionary.bias_init": "geometric_median"},
    "jumprelu": {
        "dictionary.gate": {"kind": "jumprelu"},
        "train.loss": {"sparsity": {"kind": "tanh", "coefficient": 0.1}},
    },
    "noisy": {
        "dictionary.gate": {"kind": "hard_concrete"},
        "train.loss": {"sparsity": {"kind": "l0", "coefficient": 0.1}},
    },
    "transcoder": {"dictionary.wiring": {"kind": "transcoder"}, "train.precision": "float64"},
}


@pytest.fixture
def configs(tmp_path):
    """configs(folder, **runs) → {name: settings} of runs over one store."""
    make_store(tmp_path)

    def make(folder, **runs):
        return {name: settings_in(tmp_path, changes | {"out": f"{tmp_path}/{folder}/{name}"})
                for name, changes in runs.items()}  # fmt: skip

    return make


def together(configs, known=None, stops=(), **more):
    for config in configs.values():
        loop.prepare(config)
    data = open_store(next(iter(configs.values())).source.path)
    longest = max(configs.values(), key=lambda config: config.train.steps)
    runs = {name: Run(config, stops, known=(known or {}).get(name, {}), **more) for name, config in configs.items()}
    return Together(runs, data, Shards(), loop.in_process(longest, data, Shards()), CPU)


def to_the_end(group):
    found = []
    while group.names:
        found.append((group.advance(), group.step))
    return found


def assert_same_state(got, want):
    mine, theirs = final_state(got), final_state(want)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), (got.out, name)


def assert_same_runs(got, want):
    for name in got:
        assert_same_state(got[name], want[name])
        lines = [[{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s", "data_wait")}
                  for line in logs.read(configs[name].out)] for configs in (got, want)]  # fmt: skip
        assert lines[0] == lines[1], name


def test_each_is_what_it_is_alone_from_one_read(configs, monkeypatch):
    read, gather = [], Store.gather
    monkeypatch.setattr(Store, "gather", lambda self, *given: read.append(len(given[1])) or gather(self, *given))
    alone, shared = configs("alone", **RUNS), configs("shared", **RUNS)
    for config in alone.values():
        train_alone(config)
    found = to_the_end(together(shared))
    assert_same_runs(shared, alone)
    assert [(sorted(said), step) for said, step in found] == [(["shorter"], 9), (sorted({*RUNS} - {"shorter"}), 12)]
    read.clear()
    to_the_end(together(configs("again", **{name: RUNS[name] for name in ("batchtopk", "topk")})))
    assert sum(read) == 12 * 40, "but for resampling, which reads rows of its own, each row once"


def test_one_batch_is_held_and_none_for_those_that_left(configs, monkeypatch):
    alive = weakref.WeakSet()
    real = source.batches

    def watched(*given):
        for batch in real(*given):
            alive.update(batch.values())
            yield batch
            del batch

    monkeypatch.setattr(source, "batches", watched)
    most = []

    def announce(line):
        gc.collect()
        most.append(len(alive))

    group = together(
        configs("runs", a={}, b={"train.lr": 0.003}, c={"train.lr": 0.001}),
        stops=(3, 6),
        announce=announce,
    )
    assert sorted(group.advance()) == ["a", "b", "c"]
    learners = weakref.WeakSet(run.parts.gi_frame.f_locals["learner"] for run in group._runs.values())
    group.leave("b")
    assert len(learners) == 2
    assert sorted(group.advance()) == ["a", "c"]
    assert max(most) <= 8, "one batch of four sites, and the one before it, which runs whose turn comes still hold"
    group.close()
    assert len(learners) == len(alive) == 0


def test_runs_that_stand_at_different_steps_go_on_to_the_same_end(configs):
    names = {name: RUNS[name] for name in ("batchtopk", "topk", "shorter")}
    whole = configs("whole", **names)
    said = to_the_end(together(whole, stops=(4, 8)))
    cut = configs("cut", **names)
    for name, stop in {"batchtopk": 4, "topk": 8}.items():
        group = together({name: cut[name]}, stops=(4, 8))
        while group.step < stop:
            group.advance()
        group.close()
    assert [steps(cut[name].out)[-1:] for name in names] == [[4], [8], []]
    known = {name: {line["step"]: line for line in logs.read(config.out) if line["step"] in (4, 8)}
             for name, config in cut.items()}  # fmt: skip
    again = to_the_end(together(cut, known=known, stops=(4, 8)))
    assert [(sorted(found), step) for found, step in again] == [(sorted(found), step) for found, step in said]
    for name in names:
        assert_same_state(cut[name], whole[name])


def test_what_diverges_leaves_alone(configs):
    group = together(configs("runs", good={}, bad={"train.lr": 1e300}))
    found = group.advance()
    assert list(found) == ["bad"]
    assert isinstance(found["bad"], Diverged)
    assert list(group.advance()) == ["good"]


def test_streams_are_equal_where_what_is_read_is(configs):
    made = configs(
        "runs",
        one={},
        other=RUNS["transcoder"] | {"train.lr": 1.0, "train.steps": 3, "train.accumulate": 2},
        seed={"seed": 1},
        batch={"train.batch_tokens": 20},
        order={"source.slice_rows": 2},
        ranks={"cluster.replicas": 2},
        micro_batches={"cluster.replicas": 2, "train.accumulate": 2},  # of which each replica has a part
        sites={"dictionary.wiring": {"kind": "sae", "site": "mlp_in"}},
    )
    data = open_store(made["one"].source.path)
    found = {name: stream(config, data) for name, config in made.items()}
    assert found["one"] == found["other"]
    assert len(set(found.values())) == len(found) - 1


def test_a_run_of_whose_end_nothing_is_known_does_not_leave_in_silence(configs):
    made = configs("runs", done={}, other={"train.lr": 0.003})
    train_alone(made["done"])
    with pytest.raises(RuntimeError, match="done: trained to its end, of which nothing is known"):
        to_the_end(together(made))
