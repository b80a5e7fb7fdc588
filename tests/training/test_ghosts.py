"""Ghost gradients against the formula written out in float64, whatever the split into micro-batches; and that ghosts
and AuxK keep dictionaries apart that only train together."""

import pytest
import torch

from tests.dictionary import make
from tests.equivalence import cases
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards, Wiring, losses, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.dictionary.encoding import DeadFeatures
from xlc_ray.training import Learner

CLT = wiring.clt([0, 1], 6)
DEAD = [torch.arange(10) < 4, torch.arange(10) == 9]


def learner(loss, **changes) -> Learner:
    settings = cases.config({"kind": "relu"}, loss, **{"train.clip_norm": None, **changes})
    made = Learner(build(settings.dictionary, CLT, 3, Shards()), settings)
    for g, dead in enumerate(DEAD):
        made.silent[g][dead] = 10**9
        with torch.no_grad():
            made.dictionary.groups[g].b_enc[dead] = -8.0
    made.dead_totals = [4, 1]
    return made


def reference(d, batch, weights) -> torch.Tensor:
    """The ghost loss, token by token."""
    x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
    e = (y - d.decode(d.encode(x), x)).detach()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(x)):
        ghost = torch.zeros(12, dtype=torch.float64)
        for g, group in enumerate(d.groups):
            for i in DEAD[g].nonzero().flatten().tolist():
                activation = torch.exp(x[b, 6 * g : 6 * g + 6] @ group.W_enc[i] + group.b_enc[i])
                ghost = ghost + torch.cat([torch.zeros(6 * g).double(), activation * group.W_dec[i]])
        ghost = ghost * (e[b].norm() / (2 * ghost.norm())).detach()
        own = (weights * (e[b] - ghost) ** 2).sum()
        total = total + own * ((weights * e[b] ** 2).sum() / own).detach()
    return total / len(x)


@pytest.mark.parametrize("scale", ["canonical", "per_dim"])
def test_gradients_are_those_of_the_formula(scale):
    plain, ghostly = learner({"scale": scale}), learner({"scale": scale, "ghost": {"coefficient": 0.7}})
    batch = cases.batches(CLT)[0]
    weights = torch.ones(12).double() if scale == "canonical" else torch.full((12,), 1 / 6).double()
    extra = reference(ghostly.dictionary, batch, weights)
    wanted = torch.autograd.grad(extra, list(ghostly.parameters.values()), allow_unused=True)
    plain.train_step(batch, measure=False)
    m = ghostly.train_step(batch, measure=True)
    assert m["ghost"] == pytest.approx(m["reconstruction"], rel=1e-12)
    assert m["ghost"] == pytest.approx(extra.item(), rel=1e-12)
    assert m["loss"] == pytest.approx(1.7 * m["reconstruction"], rel=1e-12)
    for (name, p), add in zip(ghostly.parameters.items(), wanted, strict=True):
        want = plain.parameters[name].grad + (0 if add is None else 0.7 * add)
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-10, msg=name)
    assert ghostly.parameters["groups.0.W_enc"].grad[DEAD[0]].ne(0).all()
    assert plain.parameters["groups.0.W_enc"].grad[DEAD[0]].eq(0).all()


PAIRS = (("a", "a2"), ("b", "b2"), ("c", "c2"))
APART = {
    "saes": wiring.sae(["a", "b", "c"], 6),
    "skip_transcoders": wiring.transcoders([0, 1, 2], 6, skip=True),
    "crosscoders": Wiring(dict.fromkeys(["a", "b", "c", "a2", "b2", "c2"], 6), PAIRS, PAIRS),
}


@pytest.mark.parametrize("scale", ["canonical", "per_dim"])
@pytest.mark.parametrize("wires", APART)
@pytest.mark.parametrize("revive", [{"ghost": {"coefficient": 0.7}}, {"auxk": {"k": 4, "coefficient": 0.7}}])
def test_dictionaries_that_only_train_together_train_as_each_alone(revive, wires, scale):
    whole, dead = APART[wires], [2, 0, 7]
    settings = cases.config({"kind": "relu"}, {"scale": scale, **revive}, **{"train.clip_norm": None})
    batch = {s: v * (30 if s in whole.writes[1] else 1) for s, v in cases.batches(whole)[0].items()}

    def trained(own: Wiring, dead: list[int], state: dict | None = None) -> tuple[Learner, dict]:
        made = Learner(build(settings.dictionary, own, 3, Shards()), settings)
        made.dictionary.load_state_dict(state or {}, strict=False)
        for silent, count in zip(made.silent, dead, strict=True):
            silent[:count] = 10**9
        made.dead_totals = dead
        return made, made.train_step({site: batch[site] for site in own.sites}, measure=True)

    start = build(settings.dictionary, whole, 3, Shards()).double().state_dict()
    together, metrics = trained(whole, dead)
    found = []
    for g, (reads, writes) in enumerate(zip(whole.reads, whole.writes, strict=True)):
        own = Wiring(dict.fromkeys(dict.fromkeys(reads + writes), 6), (reads,), (writes,), whole.skip)
        state = {name.replace(f".{g}", ".0"): value for name, value in start.items() if f".{g}" in name}
        single, measured = trained(own, [dead[g]], state)
        found.append(measured["loss"])
        for name, p in together.parameters.items():
            if f".{g}" in name:
                torch.testing.assert_close(p.grad, single.parameters[name.replace(f".{g}", ".0")].grad, msg=name)
                assert p.grad.any()
    assert metrics["loss"] == pytest.approx(sum(found), rel=1e-12)


def test_micro_batches_change_nothing():
    once, often = (learner({"ghost": {}}, **{"train.accumulate": n}) for n in (1, 4))
    batch = cases.batches(CLT)[0]
    one, two = once.train_step(batch, measure=True), often.train_step(batch, measure=True)
    assert two["ghost"] == pytest.approx(one["ghost"], rel=1e-12)
    for p, q in zip(once.parameters.values(), often.parameters.values(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-11)


def test_dead_features_come_back():
    """Below ReLU's zero nothing else gives them a gradient."""
    wires, direction = wiring.sae(["a"], 6), make.random(6, seed=2)
    draw, found = make.generator(3), []
    for loss in ({}, {"ghost": {}}):
        settings = cases.config({"kind": "relu"}, loss, **{"train.lr": 0.05, "train.steps": 300})
        made = Learner(build(settings.dictionary, wires, 3, Shards()), settings)
        with torch.no_grad():
            made.dictionary.groups[0].b_enc.fill_(-4.0)
            made.dictionary.groups[0].W_enc *= 0.1
        for _ in range(150):
            last = made.train_step({"a": (1 + torch.rand(16, 1, generator=draw).double()) * direction}, measure=True)
        found.append((last["dead_features"], last["reconstruction"]))
    assert found[0][0] == 1
    assert found[1][0] < 1
    assert found[1][1] < 0.5 * found[0][1]  # b_dec alone learns the mean, not how far a token goes


@pytest.mark.parametrize("bias", [500.0, -60.0, -500.0])
def test_no_size_of_a_preactivation_and_no_error_of_zero_breaks_it(bias):
    d = make.dictionary(CLT).float()
    with torch.no_grad():
        d.groups[0].b_enc.fill_(bias)
    masks = [torch.ones(7, dtype=torch.bool), torch.zeros(7, dtype=torch.bool)]
    x = d.normalize_inputs({s: v.float() for s, v in make.activations(CLT, 5).items()})
    code = d.analyse(x, DeadFeatures(masks, [7, 0], None))
    (_, ghost), _ = d.decode_all([code.features, code.revived], x)
    for error in (torch.full_like(ghost, 20), torch.zeros_like(ghost)):
        term = losses.ghost(ghost, error, None)
        term.backward(retain_graph=True)
        assert torch.isfinite(term)
        assert all(torch.isfinite(p.grad).all() for p in d.parameters() if p.grad is not None)


def test_one_way_to_revive_at_a_time():
    with pytest.raises(UserError, match=r"train.loss.ghost: revives dead features as auxk does; use one"):
        cases.config({"kind": "relu"}, {"auxk": {}}).override({"train.loss.ghost": {}})
