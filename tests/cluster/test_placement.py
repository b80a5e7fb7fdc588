"""Which layout the nodes have room for, and where its workers go."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import settings_in
from tests.sweeps.make import sweep_in
from xlc_ray.activations.live import LiveStore
from xlc_ray.activations.store import open_store
from xlc_ray.cluster import live_sweep, placement, supervisor, sweep, trial
from xlc_ray.cluster.placement import (
    Layout,
    Node,
    Place,
    best,
    capacity,
    groups_apart,
    layouts,
    least_models,
    place,
    with_own,
)
from xlc_ray.config import Cluster, UserError
from xlc_ray.sweeps.space import trials


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [Node(f"n{i}", f"10.0.0.{i}", c, gpus) for i, c in enumerate(cpus)]


def config(**cluster):
    changes = {"train.batch_tokens": 48, "cluster.cpus_per_worker": 1}
    return settings_in(Path("/nowhere"), changes | {f"cluster.{key}": value for key, value in cluster.items()})


def test_replicas_are_spread_or_packed_and_their_ranks_never_parted():
    two_by_two = Layout(2, 2)
    assert place(two_by_two, nodes(4, 4), config().cluster) == ("n0", "n0", "n1", "n1")
    assert place(two_by_two, nodes(4, 4), config(placement="pack").cluster) == ("n0",) * 4
    assert place(two_by_two, nodes(8, 4), config(placement="pack").cluster) == ("n1",) * 4
    # Room for four workers, but not for two pairs.
    assert place(two_by_two, nodes(1, 3), config().cluster) is None
    assert Counter(place(two_by_two, nodes(1, 3), config(placement="any").cluster)) == {"n0": 1, "n1": 3}


def test_fractions_of_cpus_and_gpus_bound_what_a_node_holds():
    tenths = config(cpus_per_worker=0.1).cluster
    assert capacity(Node("n", "a", 0.7 - 0.1, 0), tenths) == 6  # 0.6 in floating point is a bit less
    halves = config(cpus_per_worker=1, gpus_per_worker=0.5).cluster
    assert capacity(Node("n", "a", 64, 2), halves) == 4
    assert capacity(Node("n", "a", 3, 2), halves) == 3
    assert capacity(Node("n", "a", 64, 1.5), halves) == 3
    most = config(cpus_per_worker=1, gpus_per_worker=0.6).cluster
    assert capacity(Node("n", "a", 64, 2), most) == 2, "a part of a GPU is of one GPU"
    assert capacity(Node("n", "a", 64, 5), config(cpus_per_worker=1, gpus_per_worker=2).cluster) == 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 6),
       st.sampled_from(["spread", "pack", "any"]))  # fmt: skip
def test_a_place_is_found_exactly_where_there_is_one(cpus, ranks, replicas, placement):
    cluster = config(placement=placement).cluster
    found = place(Layout(ranks, replicas), nodes(*cpus), cluster)
    slots = sum(cpus) // ranks if placement == "any" else sum(c // ranks for c in cpus)
    assert (found is not None) == (slots >= replicas)
    if found:
        held = Counter(found)
        assert all(held[f"n{i}"] <= c for i, c in enumerate(cpus))
        assert len(found) == ranks * replicas
        if placement != "any":
            assert groups_apart(found, ranks) == []
        if placement == "spread":  # no node has two replicas more than one that had room for another
            loads = [(held[f"n{i}"] // ranks, c // ranks) for i, c in enumerate(cpus)]
            assert all(a <= b + 1 for a, _ in loads for b, room in loads if b < room)


@pytest.mark.parametrize(
    ("there", "changes", "message"),
    [
        (nodes(4, 4), {"cpus_per_worker": 6}, "needs 1 workers of 6 CPUs and 0 GPUs, each on one node, and the nodes "
         "have room for 0, 0; lower the settings under cluster, or add nodes"),
        (nodes(8, gpus=2), {"gpus_per_worker": 0.6, "replicas": 3}, "trial lr=0.01 needs 3 workers of 1 CPUs and 0.6 "
         "GPUs, each on one node, and the nodes have room for 2;"),
        (nodes(2, 2), {"tensor_parallel": 4, "replicas": 1}, None),
    ],
)  # fmt: skip
def test_a_trial_that_fits_the_cluster_and_no_node_is_said_at_once(monkeypatch, tmp_path, there, changes, message):
    changes = {f"cluster.{name}": value for name, value in ({"cpus_per_worker": 1} | changes).items()}
    known = trials(sweep_in(tmp_path, changes | {"train.batch_tokens": 48}))
    monkeypatch.setattr(sweep, "nodes_now", lambda free: there)
    total = {"CPU": sum(node.cpus for node in there), "GPU": sum(node.gpus for node in there)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    with pytest.raises(UserError, match=re.escape(message)) if message else nullcontext():
        sweep._find_room(known)


def test_language_models_need_room_beside_a_trial_whose_ranks_span_nodes(monkeypatch, tmp_path):
    """Which placement of single runs does not allow, and Tune does."""
    changes = {"tensor_parallel": 4, "cpus_per_worker": 1, "cpus_per_model": 2}
    source = {"kind": "live", "path": str(tmp_path / "store"), "held_chunks": 9}
    known = trials(sweep_in(tmp_path, {"source": source, **{f"cluster.{k}": v for k, v in changes.items()}}))
    stored = open_store(source["path"])
    data = LiveStore(**{field.name: getattr(stored, field.name) for field in fields(stored)})
    alive = [{"NodeID": f"n{i}", "Alive": True, "Resources": {"object_store_memory": 1e9}} for i in (0, 1)]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(live_sweep.live, "check", lambda *_: None)  # what made the store is not asked here
    monkeypatch.setattr(live_sweep, "nodes_now", lambda free: nodes(2, 3))
    with pytest.raises(UserError, match="live training needs a node with 2 CPUs"):
        live_sweep.check(known, {data.path: data})
    monkeypatch.setattr(live_sweep, "nodes_now", lambda free: nodes(2, 4))
    assert live_sweep.check(known, {data.path: data})


def test_groups_that_span_nodes_are_named():
    assert groups_apart(["a", "a", "b", "b"], 2) == []
    assert groups_apart(["a", "b", "b", "b"], 2) == [0]
    assert groups_apart(["a", "b", "c"], 1) == []


def test_smaller_layouts_follow_in_the_order_of_the_settings():
    assert layouts(config(tensor_parallel=2, replicas=4)) == [Layout(2, 4)]
    found = layouts(config(tensor_parallel=4, replicas=6, min_replicas=2, fallback_tensor_parallel=[2]))
    # 5 replicas do not divide 48 rows.
    assert found == [Layout(t, r) for t in (4, 2) for r in (6, 4, 3, 2)]


def test_the_first_layout_with_room_is_taken_and_a_larger_one_is_seen_when_nodes_are_back():
    elastic = config(tensor_parallel=2, replicas=3, min_replicas=1, fallback_tensor_parallel=[1])
    assert best(elastic, nodes(2, 2, 2)).layout == Layout(2, 3)
    assert best(elastic, nodes(2, 2)).layout == Layout(2, 2)
    assert best(elastic, nodes(1, 1)).layout == Layout(1, 2)
    assert best(elastic, nodes(0.5)) is None
    # Two replicas run and hold all; then a third node comes.
    held = Counter({"n0": 2, "n1": 2})
    assert best(elastic, nodes(0, 0, 2)).layout == Layout(2, 1)
    assert best(elastic, with_own(nodes(0, 0, 2), held, elastic.cluster)) == Place(
        Layout(2, 3), ("n0", "n0", "n1", "n1", "n2", "n2")
    )


LIVE = {"kind": "live", "path": "/nowhere/live"}


def test_a_trial_reserves_a_bundle_for_each_rank_and_language_model():
    given = {"cpus_per_worker": 2, "gpus_per_worker": 1, "cpus_per_model": 1, "gpus_per_model": 0.5, "model_actors": 3}
    stored = config(tensor_parallel=2, replicas=2, **given)
    ranks = [{"CPU": 2, "GPU": 1}] * 4
    assert trial.bundles(stored).bundles == ranks
    assert trial.bundles(stored.override({"source": LIVE})).bundles == [*ranks, *[{"CPU": 1, "GPU": 0.5}] * 3]
    assert trial.bundles(config()).bundles == [{"CPU": 1}], "a bundle of no GPU names none"


def test_live_training_leaves_a_node_room_for_a_language_model(monkeypatch):
    live = config(replicas=2, min_replicas=1, cpus_per_model=1).override({"source": LIVE})
    assert (least_models(live), least_models(config())) == (1, 0)
    assert best(live, nodes(2, 2), 1).layout == Layout(1, 2)
    assert best(live, nodes(2), 0).layout == Layout(1, 2)
    # Of two nodes one is lost.
    assert best(live, nodes(2), 1) == Place(Layout(1, 1), ("n0",))
    assert best(live, nodes(1), 1) is None
    assert best(live.override({"cluster.cpus_per_model": 2}), nodes(1.5, 1.5), 1) is None, "on one node"
    on_gpus = live.override({"cluster.gpus_per_worker": 1, "cluster.gpus_per_model": 1})
    assert best(on_gpus, nodes(8, gpus=2), 1).layout == Layout(1, 1)
    monkeypatch.setattr(supervisor, "nodes_now", lambda free: nodes(2))
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.0)
    assert supervisor._room(live).layout == Layout(1, 1)


def test_a_run_grows_into_the_last_room_beside_the_language_models_that_it_has():
    live = config(replicas=2, min_replicas=1, cpus_per_model=1).override({"source": LIVE})
    worker, model = Counter({"n0": 1}), Counter({"n0": 1})
    for back, layout in ((0, Layout(1, 1)), (1, Layout(1, 2))):
        free = with_own(nodes(0, back), worker, live.cluster, model)
        assert best(live, free, 1).layout == layout
        # The next group finds no less, once the models rest: else it would stop, smaller, for ever.
        assert free == nodes(2, back)


def test_impossible_bounds_are_one_line():
    with pytest.raises(UserError, match=r"cluster\.min_replicas: 3 exceeds cluster\.replicas = 2"):
        config(replicas=2, min_replicas=3)
    with pytest.raises(UserError, match=r"cluster\.fallback_tensor_parallel: 32 ranks cannot share"):
        config(fallback_tensor_parallel=[2, 32])


def test_what_a_language_model_takes_is_wanted_of_one_node(monkeypatch):
    monkeypatch.setattr(placement, "nodes_now", lambda free: [Node("n", "a", 4, 0), Node("m", "b", 4, 1)])
    placement.require_model(Cluster(cpus_per_model=4), "evaluation")
    said = "evaluation needs 6 CPUs and 0 GPUs of one node; the nodes have 4 and 0, 4 and 1"
    with pytest.raises(UserError, match=said):
        placement.require_model(Cluster(cpus_per_model=6), "evaluation")
    with pytest.raises(UserError, match="needs 1 CPUs and 2 GPUs of one node"):
        placement.require_model(Cluster(gpus_per_model=2), "a language model")
