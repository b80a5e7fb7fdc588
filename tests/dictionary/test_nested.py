"""Prefixes of features: what each reconstructs, and how shards share them."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.dictionary import Features, Shards, nested, wiring


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("skip", [False, True])
def test_each_prefix_reconstructs_with_its_features_alone(products, skip):
    wires = wiring.transcoders([0, 1], 4, skip) if skip else wiring.clt([0, 1, 2], 4)
    d = make.dictionary(wires, {"kind": "batchtopk", "k": 6}, products=products, features=20)
    x = d.normalize_inputs(make.activations(wires, 9))
    features = d.encode(x)
    cuts = nested.cuts([0.1, 0.5, 1.0], d.sizes, Shards())
    assert cuts == [[2, 10, 20]] * wires.groups
    found = d.decode_all([features, features], x, cuts)
    assert len(found) == 4
    for got, m in zip(found, (2, 10, 20), strict=False):
        kept = [f.dense() * (torch.arange(20) < m) for f in features]
        torch.testing.assert_close(got, d.decode([Features(v, v) for v in kept], x))
    torch.testing.assert_close(found[3] + d.offset(x), found[2])


@pytest.mark.parametrize("features", [7, 10, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_hold_every_prefix_between_them(ranks, features):
    prefixes = [0.05, 0.2, 0.5, 1.0]
    parts = [nested.cuts(prefixes, [features], Shards(rank=r, size=ranks))[0] for r in range(ranks)]
    assert [sum(stops) for stops in zip(*parts, strict=True)] == [nested.ends(p, features) for p in prefixes]
    for r, stops in enumerate(parts):
        first, last = Shards(rank=r, size=ranks).bounds(features)
        assert stops == sorted(stops)
        assert stops[-1] == last - first


def test_empty_parts_and_batches_decode_to_nothing():
    W, empty = make.random(5, 3), make.random(0, 5)
    f = make.random(4, 5)
    for form in (Features(f, f), Features(f.flatten(), f.flatten(), make.support(torch.ones(4, 5).bool()))):
        parts = nested.decode_parts(form, W, [0, 0, 5]).view(3, 4, 3)
        assert not parts[:2].any()
        torch.testing.assert_close(parts[2], f @ W)
    assert nested.decode_parts(Features(empty, empty), W, [2, 5]).shape == (0, 3)
    d = make.dictionary(wiring.sae(["a"], 3))
    nothing = make.random(0, 3)
    assert [y.shape for y in d.decode_all([d.encode(nothing)], nothing, [[2, 7]])] == [(0, 3)] * 2
