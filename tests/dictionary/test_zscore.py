"""Ranking by z-scores, as crosslayer-coding does: which entries are kept, as what, and inference without a batch."""

import pytest
import torch

from tests.dictionary import make
from tests.dictionary.test_gates import masks, topk
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, wiring
from xlc_ray.dictionary.build import make_gate


def zscores(pre):
    return (pre - pre.mean(dim=0)) / (pre.std(dim=0) + 1e-6)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_largest_z_scores_win_over_all_groups(kind):
    pre = [4 * make.random(30, 8) + 3, make.random(30, 5, seed=1) - 2]  # by value the first group would win all
    gate = topk(kind, (8, 5), 3, rank_by="zscore")
    z = torch.cat([zscores(p) for p in pre], dim=1)
    least = z.topk(3, dim=1).values[:, -1:] if kind == "topk" else z.flatten().topk(90).values[-1]
    want = z >= least.clamp(min=1e-300)  # only what is above the mean of its feature
    assert torch.equal(torch.cat(list(masks(gate, dict(enumerate(pre))).values()), dim=1), want)


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_raw_values_are_kept_also_negative_ones(products):
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, {"kind": "batchtopk", "k": 3, "rank_by": "zscore"}, products=products)
    with torch.no_grad():
        for group in d.groups:
            group.b_enc -= 20
    x = d.normalize_inputs(make.activations(wires, 12))
    code = d.analyse(x, pre=True)
    for f, pre in zip(code.features, code.pre, strict=True):
        dense = f.dense()
        torch.testing.assert_close(dense, pre.where(dense != 0, 0))
        assert (dense < 0).any()
    assert sum(int(f.l0().sum()) for f in code.features) == 36


def test_running_values_serve_inference():
    gate = topk("batchtopk", (6,), 1, rank_by="zscore", threshold_start=1, threshold_decay=0.75)
    batches = [2 * make.random(20, 6, seed=i) + torch.arange(6) for i in range(3)]
    mean, std, theta = None, None, None
    for i, pre in enumerate(batches):
        masks(gate, {0: pre})
        gate.finish_step(i + 1)
        now = pre.mean(dim=0), pre.std(dim=0), zscores(pre).flatten().topk(20).values[-1]
        if i == 0:
            mean, std, theta = now
        else:
            mean, std, theta = (0.75 * a + 0.25 * b for a, b in zip((mean, std, theta), now, strict=True))
    seen = 3 * make.random(9, 6, seed=7) + 2
    want = (seen - mean) / (std + 1e-6) > theta
    assert torch.equal(masks(gate.eval(), {0: seen})[0], want)
    assert 0 < want.sum() < want.numel()


def test_statistics_are_no_optimizers_business():
    gate = make_gate(settings.TopKGate(k=1, rank_by="zscore"), [4], Shards())
    assert [n for n, p in gate.named_parameters() if p.requires_grad] == []
    assert {n for n, _ in gate.named_parameters()} == {"zscores.mean.0", "zscores.std.0"}
