"""Zeroing a feature equals a dictionary that never had it."""

import copy

import pytest
import torch

from tests.evaluation.test_replacement import LAYERS, WIDTH, make
from xlc_ray.dictionary import wiring
from xlc_ray.evaluation.ablation import Effects, ablate_features, sample_features
from xlc_ray.evaluation.features import FeatureStatistics
from xlc_ray.evaluation.replacement import evaluate_replacement, prepare

WIRINGS = {
    "clt": wiring.clt(range(LAYERS), WIDTH),
    "acausal": wiring.crosscoder([f"resid_post.{n}" for n in range(LAYERS)], WIDTH, "acausal"),
}


def batches(windows, size):
    return [prepare(*part) for part in zip(*(v.split(size) for v in windows), strict=True)]


@pytest.mark.parametrize("name", WIRINGS)
def test_effect_of_a_feature_is_that_of_taking_its_decoder_row(model, windows, name):
    d = make(WIRINGS[name])
    with torch.no_grad():
        d.groups[0].b_enc[7] = -1e6  # never active
    features = [(0, 3), (0, 7), (d.wiring.groups - 1, 5)]
    found = ablate_features(d, model, batches(windows, 6), features)
    plain = evaluate_replacement(d, model, batches(windows, 6)).compute()
    assert found.tokens == plain["tokens"]
    by_feature = {(one["group"], one["feature"]): one for one in found.compute()}
    assert by_feature[0, 7] == {"group": 0, "feature": 7, "delta_ce": 0.0, "kl": 0.0}
    for g, i in (features[0], features[2]):
        without = copy.deepcopy(d)
        with torch.no_grad():
            without.groups[g].W_dec[i] = 0
        ce = evaluate_replacement(without, model, batches(windows, 6)).compute()["all"]["ce_replaced"]
        assert by_feature[g, i]["delta_ce"] == pytest.approx(ce - plain["all"]["ce_replaced"], abs=1e-5)
        assert by_feature[g, i]["kl"] > 0
    listed = [one["delta_ce"] for one in found.compute()]
    assert listed == sorted(listed, reverse=True)


def test_effects_merge_over_windows(model, windows):
    d, features = make(WIRINGS["clt"]), [(0, 1), (3, 2)]
    whole = ablate_features(d, model, batches(windows, 6), features)
    parts = [ablate_features(d, model, [batch], features) for batch in batches(windows, 2)]
    merged = Effects.empty(features)
    for part in reversed(parts):
        merged.merge(part)
    assert merged.tokens == whole.tokens
    torch.testing.assert_close(merged.delta, whole.delta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.divergence, whole.divergence, rtol=1e-3, atol=1e-4)


def test_the_sample_is_of_active_features_and_repeatable():
    groups = [FeatureStatistics.empty(5), FeatureStatistics.empty(5)]
    groups[0].counts[1] = groups[1].counts[0] = groups[1].counts[4] = 3
    assert sample_features(groups, 9, 0) == [(0, 1), (1, 0), (1, 4)]
    some = sample_features(groups, 2, 0)
    assert len(set(some)) == 2
    assert some == sample_features(groups, 2, 0)
    assert len({tuple(sample_features(groups, 1, seed)) for seed in range(20)}) == 3
