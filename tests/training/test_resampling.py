"""Resampling: the draw, the new rows by hand, what is left alone, the learning rate, and resuming."""

import numpy as np
import pytest
import torch

from tests.dictionary import make
from tests.equivalence import cases
from tests.runs import small_run_in
from xlc_ray.activations.store import open_store
from xlc_ray.config import UserError
from xlc_ray.config.training import Resample
from xlc_ray.dictionary import Shards, checkpoint, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.training import Diverged, Learner, logs, loop, train_alone
from xlc_ray.training.loop import wiring_for
from xlc_ray.training.resampling import draw, resample
from xlc_ray.training.schedules import resampled_after, rewarmed

CLT = wiring.clt([0, 1], 6)
JUMP = {"kind": "jumprelu", "threshold": 0.3, "bandwidth": 0.5}


def test_rows_are_drawn_by_the_square_of_their_loss():
    loss = np.array([1.0, 2.0, 0.0, 3.0])
    drawn = np.array([draw(loss, 1, 0, step)[0] for step in range(4000)])
    share = np.bincount(drawn, minlength=4) / 4000
    assert share == pytest.approx(np.array([1, 4, 0, 9]) / 14, abs=0.03)


def test_a_draw_is_without_replacement_and_repeats():
    loss = np.random.default_rng(0).random(50)
    one = draw(loss, 20, 3, 7)
    assert len(set(one)) == 20
    assert (one == draw(loss, 20, 3, 7)).all()
    assert (one == draw(1e-30 * loss, 20, 3, 7)).all()
    assert not (one == draw(loss, 20, 4, 7)).all()
    assert not (one == draw(loss, 20, 3, 8)).all()


def test_no_row_serves_two_features():
    few = draw(np.array([0.0, 1.0, 2.0, 0.0]), 5, 0, 0)
    assert sorted(few) == [-1, -1, -1, 1, 2]
    assert (draw(np.zeros(4), 3, 0, 0) == -1).all()


def learner(gate=JUMP, wires=CLT, dead=((1, 4, 7), (0,)), loss=None, **changes) -> Learner:
    changes = {"train.resample": {"every": 4, "tokens": 32}, "dictionary.products": "dense", **changes}
    settings = cases.config(gate, loss or {}, **changes)
    made = Learner(build(settings.dictionary, wires, 3, Shards()), settings)
    for batch in cases.batches(wires)[:2]:
        made.train_step(batch, measure=False)
    for g, which in enumerate(dead):
        made.silent[g] = torch.zeros_like(made.silent[g])
        made.silent[g][list(which)] = 10**9
    made.dead_totals = [len(which) for which in dead]
    return made


def state(made: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state().items()}


@pytest.mark.parametrize("decoder", ["error", "target"])
def test_dead_features_get_the_rows_of_the_definition_and_others_keep_theirs(decoder):
    made = learner(**{"train.resample": {"every": 4, "tokens": 32, "scale": 0.3, "decoder": decoder}})
    d, sample = made.dictionary, cases.batches(CLT)[:2]
    before, dead = state(made), [[1, 4, 7], [0]]
    whole = {site: torch.cat([b[site] for b in sample]) for site in CLT.sites}
    x, y = d.normalize_inputs(whole), d.normalize_targets(whole)
    d.eval()
    error = (y - d.decode(d.encode(x), x)).detach()
    rows = draw(error.square().sum(dim=1).numpy(), 4, 0, 2)
    v = error if decoder == "error" else (y - d.b_dec).detach()
    assert resample(made, lambda: iter(sample)) == 4
    after = state(made)
    for g, which in enumerate(dead):
        alive = [i for i in range(10) if i not in which]
        W_enc, W_dec = (before[f"dictionary.groups.{g}.W_{p}"] for p in ("enc", "dec"))
        lengths = [W[alive].norm(dim=1).mean() for W in (W_enc, W_dec)]
        for i in which:
            row = rows[[1, 4, 7].index(i) if g == 0 else 3]
            xs, vs = x[row, 6 * g : 6 * g + 6], v[row, 6 * g :]
            want = 0.3 * lengths[0] * xs / xs.norm()
            torch.testing.assert_close(after[f"dictionary.groups.{g}.W_enc"][i], want)
            torch.testing.assert_close(after[f"dictionary.groups.{g}.W_dec"][i], lengths[1] * vs / vs.norm())
            assert after[f"dictionary.groups.{g}.b_enc"][i] == 0
            start = torch.tensor(0.3).log().double()
            torch.testing.assert_close(after[f"dictionary.gate.raw_threshold.{g}"][i], start, rtol=1e-6, atol=1e-6)
        for name, value in after.items():
            if f".{g}." not in f"{name}.":
                continue
            assert value.ndim == 0 or torch.equal(value[alive], before[name][alive]), name
            if name.endswith(("exp_avg", "exp_avg_sq")):
                assert value[which].eq(0).all()
                assert before[name][alive].any()
        assert after[f"silent_tokens.{g}"].eq(0).all()
    assert torch.equal(after["dictionary.b_dec"], before["dictionary.b_dec"])
    assert made.dead_totals == [0, 0]


def test_the_size_of_batches_of_the_sample_changes_nothing():
    sample = cases.batches(CLT)[:2]
    parts = [{s: v[i : i + 4] for s, v in b.items()} for b in sample for i in range(0, 16, 4)]
    found = []
    for batches in (sample, parts):
        made = learner({"kind": "batchtopk", "k": 3, "threshold_start": 0})
        resample(made, lambda batches=batches: iter(batches))
        found.append(state(made))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_more_dead_features_than_rows_wait_for_the_next_time():
    made = learner(dead=(range(10), range(3)))
    short = [{s: v[:5] for s, v in cases.batches(CLT)[0].items()}]
    assert resample(made, lambda: iter(short)) == 5
    assert sum(made.dead_totals) == 8
    assert [int(m.sum()) for m in made.dead_masks()] == made.dead_totals
    assert all(torch.isfinite(p).all() for p in made.parameters.values())


def test_a_row_that_is_not_finite_stops_training():
    made, batch = learner(), cases.batches(CLT)[0]
    before = state(made)
    batch["mlp_out.1"][3, 2] = float("nan")
    with pytest.raises(Diverged, match="step 2: resampling: a row's loss is not finite"):
        resample(made, lambda: iter([batch]))
    assert all(torch.equal(value, before[name]) for name, value in made.state().items())


def test_where_none_is_dead_nothing_changes():
    made = learner(dead=((), ()))
    before = state(made)
    assert resample(made, lambda: iter(())) == 0
    assert all(torch.equal(value, before[name]) for name, value in made.state().items())


@pytest.mark.parametrize("gate", [{"kind": "relu"}, {"kind": "topk", "k": 3}, JUMP], ids=lambda g: g["kind"])
def test_resampled_features_fire_on_the_rows_they_come_from_and_reduce_the_error(gate):
    wires = wiring.sae(["a"], 6)
    sample = [{"a": make.random(64, 6, seed=1)}]
    made = learner(gate, wires, dead=(range(6),))
    d = made.dictionary
    with torch.no_grad():
        d.groups[0].b_enc[:6] = -50.0
    x = d.normalize_inputs(sample[0])
    d.eval()
    assert not d.encode(x)[0].count()[:6].any()
    assert resample(made, lambda: iter(sample)) == 6
    if gate["kind"] == "topk":
        d.gate.k = 10  # whether they would fire, were there places enough
    assert (d.encode(x)[0].count()[:6] > 0).all()


def test_unit_norm_and_tied_decoders():
    unit = learner(**{"dictionary.unit_norm": True, "dictionary.decoder_norm": 0.1})
    resample(unit, lambda: iter(cases.batches(CLT)[:2]))
    torch.testing.assert_close(unit.dictionary.groups[0].norms().detach(), torch.ones(10).double())
    wires = cases.WIRINGS["tied_per_source"]
    made = learner(wires=wires, dead=((2,), (), ()))
    d, sample = made.dictionary, cases.batches(wires)[:1]
    before = d.groups[0].feature_scale.detach().clone()
    x, y = d.normalize_inputs(sample[0]), d.normalize_targets(sample[0])
    d.eval()
    error = (y - d.decode(d.encode(x), x)).detach()
    row = draw(error.square().sum(dim=1).numpy(), 1, 0, 2)[0]
    resample(made, lambda: iter(sample))
    want = error[row].view(3, 6).sum(dim=0)
    torch.testing.assert_close(d.groups[0].W_dec[2] / d.groups[0].W_dec[2].norm(), want / want.norm())
    assert torch.equal(d.groups[0].feature_scale, before)  # a target's, not only this feature's
    with pytest.raises(UserError, match=r"train.resample: decoders tied per_target belong to features of all groups"):
        made.config.override({"dictionary.wiring.tied": "per_target"})


def test_a_wiring_of_the_users_own_that_is_tied_per_target_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "wiring_tied_per_target.py").write_text(
        "from dataclasses import replace\n"
        "from xlc_ray.dictionary import wiring\n"
        "def shared(layers, width, by):\n"
        "    return replace(wiring.clt(layers, width), tied=wiring.Tying(by, False, False))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = small_run_in(tmp_path)({"train.resample": {"every": 4, "tokens": 32}})
    mine = {"kind": "custom", "path": "wiring_tied_per_target:shared"}
    data = open_store(config.source.path)
    per_source = config.override({"dictionary.wiring": {**mine, "options": {"by": "per_source"}}})
    assert wiring_for(per_source, data).tied.by == "per_source"
    per_target = config.override({"dictionary.wiring": {**mine, "options": {"by": "per_target"}}})
    with pytest.raises(UserError, match=r"^train.resample: decoders tied per_target belong to features of all groups"):
        wiring_for(per_target, data)
    assert wiring_for(per_target.override({"train.resample": None}), data).tied.by == "per_target"


def test_the_rate_rises_again_after_each_resampling():
    settings = Resample(every=4, tokens=1, warmup=2, until=0.75)
    assert [resampled_after(settings, step, 16) for step in (0, 3, 4, 7, 8, 12, 15, 16)] == [0, 0, 4, 4, 8, 12, 12, 12]
    assert resampled_after(Resample(every=4, tokens=1), 8, 8) == 4  # not at the very end
    assert [rewarmed(settings, step, 16) for step in (0, 3, 4, 5, 6, 12, 13)] == [1, 1, 0.5, 1, 1, 0.5, 1]
    assert rewarmed(None, 4, 8) == 1
    with pytest.raises(ValueError, match="warmup = 5 exceeds every = 4"):
        Resample(every=4, tokens=1, warmup=5)
    made = learner(
        **{"train.resample": {"every": 4, "tokens": 1, "warmup": 2}, "train.lr_schedule": {"kind": "constant"}}
    )
    assert [made.lr(step) for step in (3, 4, 5)] == [0.01, 0.005, 0.01]


RUN = {
    "train.resample": {"every": 3, "tokens": 70, "warmup": 2},
    "train.precision": "float64",
    "train.dead_after_tokens": 40,
    "train.loss": {},
    "dictionary.gate": {"kind": "topk", "k": 1},
}


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(small_run, tmp_path):
    whole = small_run(RUN)
    last = train_alone(whole)
    counts = [line["resampled"] for line in logs.read(whole.out) if "resampled" in line]
    assert len(counts) == 3  # after 3, 6 and 9 of 12 steps
    assert max(counts) > 0
    (tmp_path / "run/checkpoints/step_12/complete.json").unlink()
    again = train_alone(whole)
    assert checkpoint.steps(whole.out)[-1] == 12
    for key in ("loss", "reconstruction", "explained_variance", "l0", "dead_features", "grad_norm", "lr"):
        assert again[key] == last[key], key


@pytest.mark.parametrize(("tokens", "steps_done"), [(70, 3), (203, 3), (1000, 7), (100, 4), (1, 0)])
def test_the_sample_is_rows_of_one_epoch_in_any_layout(small_run, tokens, steps_done):
    config, found = small_run(RUN).override({"train.resample.tokens": tokens}), []
    data = open_store(config.source.path)
    for accumulate in (1, 4):
        config = config.override({"train.accumulate": accumulate})
        made = Learner(build(config.dictionary, loop.wiring_for(config, data), 0, Shards()), config)
        made.step = steps_done
        sample = [{site: v.clone() for site, v in b.items()} for b in loop._sample(config, made, data)]
        assert max(len(b["mlp_in.0"]) for b in sample) <= 40 // accumulate
        found.append({site: torch.cat([b[site] for b in sample]) for site in sample[0]})
    assert all(torch.equal(found[0][site], found[1][site]) for site in found[0])
    rows = torch.cat(list(found[0].values()), dim=1)
    assert len(rows) == min(tokens, 203)
    assert len(rows.unique(dim=0)) == len(rows)


def test_resampling_leaves_fewer_features_dead(small_run):
    high = {"kind": "jumprelu", "threshold": 3.0, "bandwidth": 0.1}
    changes = {**RUN, "dictionary.gate": high, "train.dead_after_tokens": 80, "train.lr": 1e-4}
    plain = train_alone(small_run({**changes, "train.resample": None, "out": small_run().out + "_plain"}))
    changes["train.resample"] = {"every": 3, "tokens": 203, "scale": 3.0}
    resampled = train_alone(small_run(changes))  # for the last time after step 9 of 12, 120 tokens before the end
    assert plain["dead_features"] > 0.5
    assert resampled["dead_features"] < 0.5 * plain["dead_features"]


@pytest.mark.parametrize("gate", ["hard_concrete", "gated_hard_concrete", "gated"])
def test_gates_of_more_parameters_start_anew_as_at_the_start(gate):
    loss = {} if gate == "gated" else {"sparsity": {"kind": "l0", "coefficient": 0.1}}
    made = learner({"kind": gate} | ({} if gate == "gated" else {"alpha": -0.5}), loss=loss)
    fresh = dict(build(made.config.dictionary, CLT, 3, Shards()).named_parameters())
    before = {name: p.detach().clone() for name, p in made.dictionary.named_parameters()}
    assert resample(made, lambda: iter(cases.batches(CLT)[:2])) == 4
    for g, which in enumerate([[1, 4, 7], [0]]):
        alive = [i for i in range(10) if i not in which]
        own = [name for name in before if name.startswith(("gate.", f"groups.{g}.b_enc")) and f".{g}" in name]
        assert len(own) >= 3
        for name in own:
            now = made.parameters[name].detach()
            assert torch.equal(now[alive], before[name][alive]), name
            assert not torch.equal(now[which], before[name][which]), name
            want = made.dictionary.groups[g].W_enc[which] if "W_mag" in name else fresh[name][which].double()
            torch.testing.assert_close(now[which], want, msg=name)
