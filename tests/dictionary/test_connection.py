"""Sparse connections: the sum by hand, its gradient, shards, tiles, units, and which runs fit."""

import pytest
import torch

from tests.dictionary import make
from tests.equivalence import cases
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards, Wiring, connection, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Learner

WIRES = wiring.clt([0, 1], 6)


def by_hand(ours, theirs) -> float:
    return sum(abs(float(a @ b)) for a in ours for b in theirs) / len(theirs)


@pytest.mark.parametrize("tile", [1, 40, 2**23])
def test_the_penalty_and_its_gradient_are_those_of_the_definition(tile, monkeypatch):
    monkeypatch.setattr(connection, "TILE", tile)
    d = make.dictionary(WIRES)
    rows = {"mlp_out.1": make.random(11, 6, seed=4), "mlp_out.0": make.random(5, 6, seed=5)}
    got = connection.overlap(d, rows)
    first, second = (g.W_dec.detach() for g in d.groups)
    want = by_hand(first[:, :6], rows["mlp_out.0"])
    want += by_hand(first[:, 6:], rows["mlp_out.1"]) + by_hand(second, rows["mlp_out.1"])
    assert got.item() == pytest.approx(want, rel=1e-12)
    (2 * got).backward()
    found = [g.W_dec.grad.clone() for g in d.groups]
    d.zero_grad()
    pairs = [(0, "mlp_out.0"), (0, "mlp_out.1"), (1, "mlp_out.1")]
    plain = sum((d.decoder_rows(g, s) @ rows[s].T).abs().sum() / len(rows[s]) for g, s in pairs)
    (2 * plain).backward()
    for grad, group in zip(found, d.groups, strict=True):
        torch.testing.assert_close(grad, group.W_dec.grad, rtol=1e-12, atol=1e-12)


def test_the_parts_of_ranks_add_up_to_the_whole():
    rows = {"mlp_out.1": make.random(11, 6).float()}
    whole = connection.overlap(build(make.section(), WIRES, 5, Shards()), rows)
    parts = [connection.overlap(build(make.section(), WIRES, 5, Shards(rank=r, size=3)), rows) for r in range(3)]
    torch.testing.assert_close(sum(parts), whole)


def run_of(tmp_path, name: str, wires: Wiring, **changes) -> tuple[str, Learner]:
    config = cases.config({"kind": "relu"}, {}, **changes).override({"out": str(tmp_path / name)})
    learner = Learner(build(config.dictionary, wires, 3, Shards()), config)
    learner.dictionary.write_scale.copy_(torch.arange(1.0, 1.0 + len(learner.dictionary.write_scale)))
    learner.save(config.out)
    (tmp_path / name / "config.yaml").write_text(config.yaml())
    return config.out, learner


def test_rows_of_a_run_come_in_our_units(tmp_path):
    path, other = run_of(tmp_path, "other", wiring.sae(["mlp_out.1", "mlp_out.7"], 6))
    d = make.dictionary(WIRES)
    d.write_scale.fill_(2.0)
    rows = connection.others(d, path)
    assert list(rows) == ["mlp_out.1"]
    want = other.dictionary.groups[0].W_dec.detach() * torch.arange(1.0, 7.0).double() / 2
    torch.testing.assert_close(rows["mlp_out.1"], want, rtol=1e-6, atol=1e-6)


def test_runs_that_do_not_fit_are_refused(tmp_path):
    path, _ = run_of(tmp_path, "elsewhere", wiring.sae(["resid_post.1"], 6))
    with pytest.raises(
        UserError, match=r"elsewhere writes resid_post.1, of which .* none; allowed: mlp_out.0, mlp_out"
    ):
        connection.others(make.dictionary(WIRES), path)
    path, _ = run_of(tmp_path, "narrow", wiring.sae(["mlp_out.1"], 3))
    with pytest.raises(UserError, match=r"narrow has mlp_out.1 of width 3, this dictionary of 6"):
        connection.others(make.dictionary(WIRES), path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        connection.others(make.dictionary(WIRES), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_counts_it_once_a_step_and_makes_connections_sparser(tmp_path, accumulate):
    path, _ = run_of(tmp_path, "other", wiring.sae(["mlp_out.0", "mlp_out.1"], 6))
    found = []
    for coefficient in (0.0, 3.0):
        loss = {"connection": {"run": path, "coefficient": coefficient}}
        config = cases.config({"kind": "topk", "k": 2}, loss, **{"train.accumulate": accumulate})
        learner = Learner(build(config.dictionary, WIRES, 3, Shards()), config)
        for batch in cases.batches(WIRES):
            before = connection.overlap(learner.dictionary, learner.objective.others).item()
            last = learner.train_step(batch, measure=True)
            assert last["connection"] == pytest.approx(before, rel=1e-12)
            assert last["loss"] == pytest.approx(last["reconstruction"] + coefficient * before, rel=1e-12)
        found.append(last["connection"])
    assert found[1] < 0.8 * found[0]
