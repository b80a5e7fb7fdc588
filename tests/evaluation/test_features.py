"""The statistics of single features: known answers, merging, and the file that holds them."""

import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from tests.dictionary import make
from xlc_ray import files
from xlc_ray.dictionary import wiring
from xlc_ray.dictionary.fold import untie
from xlc_ray.evaluation import evaluate_reconstruction
from xlc_ray.evaluation.core import CoreSums, CoreWatch, core_metrics
from xlc_ray.evaluation.features import FeatureStatistics, FeatureWatch, feature_table, write_features
from xlc_ray.evaluation.metrics import Moments


def clt():
    """Two layers of width 2, three features a group, ReLU; feature 2 of group 0 is a zero row and never active."""
    d = make.dictionary(wiring.clt([0, 1], 2), features=3).eval()
    with torch.no_grad():
        for group in d.groups:
            group.b_enc.zero_()
        d.b_dec.zero_()
        d.groups[0].W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0]]))
        d.groups[0].W_dec.copy_(torch.tensor([[3.0, 0, 0, 4], [2, 0, 0, 1], [0, 0, 0, 0]]))
        d.write_scale.copy_(torch.tensor([1.0, 1, 2, 2]))
    return d


BATCH = {
    "mlp_in.0": torch.tensor([[1.0, 0], [3, 0], [-1, 2], [0, 0]], dtype=torch.float64),
    "mlp_in.1": torch.ones(4, 2, dtype=torch.float64),
    "mlp_out.0": torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 1]], dtype=torch.float64),
    "mlp_out.1": torch.tensor([[0.0, 1], [0, 3], [0, 0], [0, 0]], dtype=torch.float64),
}


def test_table_of_a_hand_made_dictionary(tmp_path):
    d = clt()
    watch = FeatureWatch.empty(d.sizes)
    metrics = evaluate_reconstruction(d, [BATCH], [watch])
    path = write_features(str(tmp_path), feature_table(d, watch, metrics.sites))
    rows = pq.read_table(io.BytesIO(files.read_bytes(path))).to_pylist()
    assert [(row["group"], row["feature"]) for row in rows] == [(g, i) for g in range(2) for i in range(3)]
    first, second, third = rows[:3]
    assert first == {
        "group": 0,
        "feature": 0,
        "density": 0.5,
        "max_activation": 3.0,
        "mean_activation": 2.0,  # of the two tokens on which it is active
        "decoder_norm": 5.0,
        "site": "mlp_out.1",
        "site_index": 1,
        "site_share": 16 / 25,
        "cosine_to_mean": 1.0,
        "dead": False,
    }
    assert (second["site"], second["site_share"], second["density"]) == ("mlp_out.0", 0.8, 0.25)
    assert second["cosine_to_mean"] == pytest.approx(2**-0.5)
    assert third["dead"]
    assert third["decoder_norm"] == third["density"] == 0
    nothing = ("max_activation", "mean_activation", "site", "site_index", "site_share", "cosine_to_mean")
    assert all(third[name] is None for name in nothing)
    assert {row["site"] for row in rows[3:]} == {"mlp_out.1"}


@pytest.mark.parametrize("by", ["per_source", "per_target"])
def test_tied_decoders_have_the_table_of_the_untied_dictionary(by):
    wires = replace(wiring.clt([0, 1, 2], 4), tied=wiring.Tying(by, scale=True, offset=False))
    d, batch = make.dictionary(wires, features=9).eval(), make.activations(wires, 40)
    with torch.no_grad():
        d.write_scale.copy_(torch.arange(1.0, 13))
        for g, group in enumerate(d.groups):
            group.feature_scale.copy_(1 + make.random(9, seed=g))
    tables = []
    for one in (d, untie(d)):
        watch = FeatureWatch.empty(one.sizes)
        tables.append(feature_table(one, watch, evaluate_reconstruction(one, [batch], [watch]).sites))
    for name in tables[0].column_names:
        got, want = (table[name].to_pylist() for table in tables)
        assert got == (want if isinstance(want[0], bool | int | str) else pytest.approx(want)), name
    assert {row["site"] for row in tables[0].to_pylist()} == {"mlp_out.0", "mlp_out.1", "mlp_out.2"}


def test_statistics_are_those_of_the_dense_matrix_and_merge():
    d = make.dictionary(wiring.sae(["a"], 4), {"kind": "topk", "k": 2, "pool": "group"}, features=40).eval()
    x = make.random(300, 4)
    parts = [d.encode(part)[0] for part in x.split([100, 1, 199])]
    whole = FeatureStatistics.empty(40)
    whole.update(d.encode(x)[0])
    f = d.encode(x)[0].dense()
    assert torch.equal(whole.counts, (f != 0).sum(0))
    torch.testing.assert_close(whole.total, f.sum(0))
    assert torch.equal(whole.largest.clamp(min=0), f.amax(0))
    singles = []
    for part in parts:
        singles.append(FeatureStatistics.empty(40))
        singles[-1].update(part)
    a, b, c = singles
    b.merge(c)
    a.merge(b)  # a + (b + c)
    assert a.tokens == whole.tokens == 300
    assert torch.equal(a.counts, whole.counts)
    assert torch.equal(a.largest, whole.largest)
    torch.testing.assert_close(a.total, whole.total, rtol=1e-13, atol=0)


def test_core_sums_by_the_formulas_in_two_passes_and_merged():
    x, x_hat = make.random(60, 5) * 3 + 1, make.random(60, 5, seed=1)
    batches = list(zip(x.split(20), x_hat.split(20), strict=True))
    sums, moments, halves = CoreSums(), Moments.empty(5), []
    for here, there in batches:
        halves.append(CoreSums())
        for accumulator in (sums, moments, halves[-1]):
            accumulator.update(here, there)
    residual = (x - x_hat).square().sum(1)
    spread = torch.cat([(b - b.mean(0)).square().sum(1) for b, _ in batches])
    square = x.square().sum(1).mean()
    want = {
        "reconstruction_quality": {
            "explained_variance": 1 - residual.mean() / (square - (square / 5) ** 2),
            "explained_variance_legacy": (1 - residual / spread).mean(),
            "mse": residual.mean(),
            "cossim": torch.nn.functional.cosine_similarity(x, x_hat).mean(),
        },
        "shrinkage": {
            "l2_norm_in": x.norm(dim=1).mean(),
            "l2_norm_out": x_hat.norm(dim=1).mean(),
            "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
            "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        },
    }
    halves[1].merge(halves[2])
    halves[0].merge(halves[1])
    for found in (sums.compute(moments), halves[0].compute(moments)):
        for category, values in want.items():
            assert found[category] == pytest.approx({k: float(v) for k, v in values.items()}), category


def test_core_metrics_carry_saebench_names_for_each_site_and_all():
    d = clt()
    watch, core = FeatureWatch.empty(d.sizes), CoreWatch.empty({"mlp_out.0": 2, "mlp_out.1": 2})
    moments = evaluate_reconstruction(d, [BATCH], [watch, core]).sites
    scores = {"ce_replaced": 3.0, "ce_ablated": 8.0, "ce_recovered": 0.9, "kl": 0.5, "kl_ablated": 2.0}
    replacement = {"tokens": 3, "ce_original": 2.5, "all": scores, "sites": dict.fromkeys(core.sites, scores)}
    found = core_metrics(d, core, moments, watch.groups, replacement)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    whole, first = found["eval_result_metrics"], found["sites"]["mlp_out.0"]
    assert list(whole) == [
        "model_behavior_preservation",
        "model_performance_preservation",
        "reconstruction_quality",
        "shrinkage",
        "sparsity",
        "misc_metrics",
        "token_stats",
    ]
    assert whole["model_behavior_preservation"]["kl_div_score"] == 0.75
    assert whole["model_performance_preservation"]["ce_loss_score"] == 0.9
    assert whole["token_stats"] == {"total_tokens_eval_reconstruction": 3, "total_tokens_eval_sparsity_variance": 4}
    # Group 0 alone writes mlp_out.0: features 0 and 1 are active on 2 and 1 of 4 tokens, with Σ f = 4 and 2.
    assert first["sparsity"] == {"l0": 0.75, "l1": 1.5}
    assert first["misc_metrics"]["frac_alive"] == pytest.approx(2 / 3)
    assert first["misc_metrics"]["freq_over_10_percent"] == pytest.approx(2 / 3)
    assert first["misc_metrics"]["normalized_freq_over_10_percent"] == 1
    assert whole["sparsity"]["l0"] > first["sparsity"]["l0"]
    without = core_metrics(d, core, moments, watch.groups, None)
    assert "model_behavior_preservation" not in without["eval_result_metrics"]
