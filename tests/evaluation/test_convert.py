"""Converted dictionaries: equal codes where only the gate's name changes, the l0 asked for, and honest refusals."""

import json

import pytest
import torch

from tests.dictionary import make
from tests.runs import small_run_in
from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.cluster import convert as job
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint, wiring
from xlc_ray.dictionary.gates import JumpReLU
from xlc_ray.evaluation import convert
from xlc_ray.evaluation.convert import conversion_table, convert_dictionary
from xlc_ray.evaluation.thresholds import (
    HALF,
    SCALES,
    Kept,
    Ladder,
    feature_thresholds,
    pool_thresholds,
    with_thresholds,
)
from xlc_ray.training import train_alone

GATES = {
    "batchtopk": {"kind": "batchtopk", "k": 3, "threshold_start": 3},
    "batchtopk_group": {"kind": "batchtopk", "k": 2, "pool": "group", "threshold_start": 3},
    "batchtopk_norm": {"kind": "batchtopk", "k": 3, "rank_by": "decoder_norm", "threshold_start": 3},
    "topk": {"kind": "topk", "k": 3, "threshold_start": 3},
    "topk_group": {"kind": "topk", "k": 2, "pool": "group"},
    "topk_norm": {"kind": "topk", "k": 2, "pool": "group", "rank_by": "decoder_norm"},
    "jumprelu": {"kind": "jumprelu", "threshold": 0.3},
    "tied_norm": {"kind": "batchtopk", "k": 3, "rank_by": "decoder_norm", "threshold_start": 3},
    "tied_target": {"kind": "batchtopk", "k": 3, "threshold_start": 3},
}
TIED = {
    "tied_norm": {"tied": "per_source"},
    "tied_target": {"tied": "per_target", "feature_scale": True},
}
NO_OPTIONS = {"per_feature": False, "target_l0": None, "tolerance": 0.1, "folded": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """gate's name → (config, run directory) of a short run of a CLT on 203 rows."""
    done = {}

    def run(name):
        if name not in done:
            changes = {"dictionary.gate": GATES[name], "dictionary.wiring": {"kind": "clt", **TIED.get(name, {})}}
            config = small_run_in(tmp_path_factory.mktemp(name))(changes)
            train_alone(config)
            done[name] = config
        return done[name]

    return run


def converted(config, **options):
    dictionary = checkpoint.load_dictionary(config.out)[0]
    return dictionary, convert_dictionary(
        dictionary, config, store.open_store(config.source.path), None, **(NO_OPTIONS | options)
    )


def rows(config, dictionary):
    data = store.open_store(config.source.path)
    return {s: store.decode(v, data.dtype) for s, v in data.read(0, 0, 90, dictionary.wiring.sites).items()}


def codes(dictionary, batch):
    return [f.dense() for f in dictionary.encode(dictionary.normalize_inputs(batch))]


@pytest.mark.parametrize("name", ["batchtopk", "batchtopk_group", "batchtopk_norm", "topk", "tied_norm"])
def test_at_scale_one_the_codes_are_those_of_the_inference_form(trained, name):
    config = trained(name)
    before, found = converted(config, tolerance=1000.0)
    assert [group["scale"] for group in found.report["groups"]] == [1.0, 1.0]
    assert isinstance(found.dictionary.gate, JumpReLU)
    assert found.report["nmse"]["before"] == pytest.approx(found.report["nmse"]["after"])
    batch = rows(config, before)
    for was, now in zip(codes(before, batch), codes(found.dictionary, batch), strict=True):
        assert was.count_nonzero() > 0
        assert torch.equal(was, now)
    weights = found.dictionary.groups.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in before.groups.state_dict().items())


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_l0_stays_within_the_tolerance(trained, name, per_feature):
    config = trained(name)
    _, found = converted(config, per_feature=per_feature, tolerance=0.1)
    report = found.report
    # Five batches of 40 rows are what training reads first; the report measures on the same where nothing is held out.
    assert report["calibration_tokens"] == report["tokens"] == 200
    assert report["measured_on"] == "training rows"
    assert report["l0"]["after"] == pytest.approx(report["calibrated_l0"], abs=1e-9)
    assert abs(report["l0"]["after"] - report["target_l0"]) <= 0.1
    for group in report["groups"]:
        assert abs(group["l0_after"] - group["target_l0"]) <= 0.05
    if name.startswith("batchtopk") or name == "topk":
        places = config.dictionary.gate.k * (2 if config.dictionary.gate.pool == "group" else 1)
        assert report["target_l0"] == pytest.approx(places, rel=0.02)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    lines = conversion_table(report).splitlines()
    first = ["l0", "mlp_in.0", "mlp_in.1", "all", "nmse", "mlp_out.0", "mlp_out.1", "all", "thresholds:"]
    assert [line.split()[0] for line in lines if line] == first
    assert f"{report['l0']['after']:.3f}" in lines[3]


def test_held_out_rows_come_in_batches_as_large_as_the_settings_say(trained, monkeypatch):
    read, asked = convert.held_out_batches, []
    monkeypatch.setattr(convert, "held_out_batches", lambda *given: asked.append(given[2:]) or read(*given))
    config = trained("batchtopk").override({"evaluate.batch_tokens": 70, "evaluate.tokens": 150})
    dictionary, rows = checkpoint.load_dictionary(config.out)[0], store.open_store(config.source.path)
    report = convert_dictionary(dictionary, config, rows, rows, **NO_OPTIONS).report
    assert set(asked) == {(70, 150)}
    assert report["tokens"] == 150


def test_a_target_is_shared_as_the_groups_share_it_now(trained):
    _, found = converted(trained("batchtopk"), target_l0=4.5)
    assert found.report["l0"]["after"] == pytest.approx(4.5, abs=0.1)
    groups = found.report["groups"]
    _, as_trained = converted(trained("batchtopk"))
    shares = [g["target_l0"] for g in as_trained.report["groups"]]
    assert [g["target_l0"] for g in groups] == pytest.approx([4.5 * n / sum(shares) for n in shares])
    assert all(g["scale"] < 1 for g in groups)


def test_a_target_out_of_reach_and_gates_without_thresholds_are_refused(trained):
    with pytest.raises(UserError, match=r"group 0 \(mlp_in.0\): thresholds times 0.1 to 10 give an l0 of .* within"):
        converted(trained("batchtopk"), target_l0=47.9)
    with pytest.raises(UserError, match="--target-l0: 0 should be greater"):
        converted(trained("batchtopk"), target_l0=0.0)
    with pytest.raises(UserError, match="--tolerance"):
        converted(trained("batchtopk"), tolerance=0.0)
    relu = make.dictionary(wiring.clt([0, 1], 6)).float()
    config = trained("batchtopk")
    with pytest.raises(UserError, match="ReLU has no threshold to find; allowed: topk, batchtopk, jumprelu"):
        convert_dictionary(relu, config, store.open_store(config.source.path), None, **NO_OPTIONS)
    signed = make.dictionary(wiring.clt([0, 1], 6), {"kind": "topk", "k": 2, "rank_by": "zscore"}).float()
    with pytest.raises(UserError, match="rank_by: zscore keeps pre-activations of any sign"):
        convert_dictionary(signed, config, store.open_store(config.source.path), None, **NO_OPTIONS)


@pytest.mark.parametrize("name", ["batchtopk_norm", "topk_group"])
def test_folded_reconstructs_the_same_from_raw_activations(trained, name):
    config = trained(name)
    _, plain = converted(config, per_feature=True)
    _, found = converted(config, per_feature=True, folded=True)
    batch = rows(config, plain.dictionary)
    for site, value in plain.dictionary.reconstruct(batch).items():
        torch.testing.assert_close(found.dictionary.reconstruct(batch)[site], value, rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(g.norms(), torch.ones(24)) for g in found.dictionary.groups)
    assert torch.equal(found.dictionary.read_scale, torch.ones(12))
    assert found.config.dictionary.normalization.kind == "none"


def test_per_feature_thresholds_are_means_of_what_each_batch_kept_least():
    wires = wiring.sae(["a"], 2)
    d = make.dictionary(wires, {"kind": "topk", "k": 1, "pool": "group"}, features=3).eval()
    with torch.no_grad():
        d.groups[0].W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [0, -1]]))
        d.groups[0].b_enc.zero_()
    kept = Kept.empty(3)
    for x in ([[3.0, 0], [5, 1], [0, 2]], [[4.0, 0], [1, 0]], [[-1.0, 0]]):
        features = d.encode(torch.tensor(x, dtype=torch.float64))[0]
        kept.update(features, None)
    # feature 0 keeps 3, 5 and then 4, 1; feature 1 keeps 2 once; feature 2 never
    assert kept.batches.tolist() == [2, 1, 0]
    assert kept.l0 == 5 / 6
    (pool,) = pool_thresholds(d, [kept])
    assert pool.tolist() == [(3 + 5 + 2 + 4 + 1) / 5] * 3
    (theta,) = feature_thresholds([kept], [pool])
    assert theta.tolist() == [(3 + 1) / 2, 2, 3]


def test_the_ladder_counts_what_a_gate_with_scaled_thresholds_lets_through():
    d = make.dictionary(wiring.sae(["a"], 4), features=30).eval()
    x, theta = make.random(50, 4), torch.rand(30, dtype=torch.float64, generator=make.generator())
    theta[0] = 0.0
    ladder = Ladder.empty()
    ladder.update(with_thresholds(d, [theta * SCALES[0]]).encode(x)[0], theta)
    assert SCALES[HALF] == 1
    for k in (0, 1, 9999, HALF, HALF + 7, len(SCALES) - 1):
        l0 = with_thresholds(d, [theta * SCALES[k]]).encode(x)[0].l0().double().mean()
        assert float(ladder.l0()[k]) == pytest.approx(float(l0)), k
    assert ladder.scale(float(ladder.l0()[HALF]) + 0.01, 0.02, "")[0] == 1
    scale, reached = ladder.scale(float(ladder.l0()[5000]), 1e-9, "")
    assert reached == float(ladder.l0()[5000])
    assert scale < 1


def test_the_run_that_is_written_loads_and_cannot_be_trained_on(trained, tmp_path):
    config = trained("batchtopk").override({"out": f"{tmp_path}/jump", "train.precision": "float64"})
    report = job._convert(trained("batchtopk").out, config, NO_OPTIONS)
    loaded, settings = checkpoint.load_dictionary(config.out)
    assert settings.dictionary.gate.kind == "jumprelu"
    assert settings.out == config.out
    assert files.read_json(f"{config.out}/conversion.json") == report
    assert files.read_bytes(f"{config.out}/metrics.jsonl") == files.read_bytes(
        f"{trained('batchtopk').out}/metrics.jsonl"
    )
    _, found = converted(trained("batchtopk"))
    for name, value in found.dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(UserError, match="a converted dictionary, without an optimizer's state"):
        train_alone(settings)


@pytest.mark.parametrize("name", ["batchtopk", *TIED])
def test_a_folded_run_loads_with_the_wiring_of_its_weights(trained, name, tmp_path):
    config = trained(name).override({"out": f"{tmp_path}/jump"})
    job._convert(trained(name).out, config, NO_OPTIONS | {"folded": True})
    loaded, settings = checkpoint.load_dictionary(config.out)
    assert loaded.wiring.tied is None
    assert settings.dictionary.wiring.tied is None
    _, plain = converted(trained(name))
    batch = rows(config, loaded)
    for site, value in plain.dictionary.reconstruct(batch).items():
        torch.testing.assert_close(loaded.reconstruct(batch)[site], value, rtol=1e-4, atol=1e-4)
