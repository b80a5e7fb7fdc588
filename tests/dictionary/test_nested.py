"""Prefixes of features: what each reconstructs, and how shards share them."""

from dataclasses import replace

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
    found, _ = d.decode_all([features, features], x, cuts=cuts)
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


@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_are_no_features(pool, training):
    d = make.dictionary(wiring.clt([0, 1], 3), gate={"kind": "topk", "k": 2, "pool": pool}).train(training)
    assert [f.values.numel() for f in d.encode(make.random(0, 6))] == [0, 0]


def test_empty_parts_and_batches_decode_to_nothing():
    W, empty = make.random(5, 3), make.random(0, 5)
    f = make.random(4, 5)
    for form in (Features(f, f), Features(f.flatten(), f.flatten(), make.support(torch.ones(4, 5).bool()))):
        parts = nested.decode_parts(form, W, [0, 0, 5])[0].view(3, 4, 3)
        assert not parts[:2].any()
        torch.testing.assert_close(parts[2], f @ W)
    assert nested.decode_parts(Features(empty, empty), W, [2, 5])[0].shape == (0, 3)
    d = make.dictionary(wiring.sae(["a"], 3))
    nothing = make.random(0, 3)
    found, _ = d.decode_all([d.encode(nothing)], nothing, cuts=[[2, 7]])
    assert [y.shape for y in found] == [(0, 3)] * 2


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("norms", [False, True])
def test_norms_get_their_gradient_with_the_prefixes(products, norms):
    """The gradient of a penalty on norms is added where that of the prefixes is made."""
    wires = wiring.clt([0, 1], 4)
    d = make.dictionary(wires, {"kind": "topk", "k": 3}, products=products, features=12)
    x = d.normalize_inputs(make.activations(wires, 9))
    code = d.analyse(x, norms=norms)
    found, lengths = d.decode_all([code.features], x, code.norms, nested.cuts([0.3, 1.0], d.sizes, Shards()))
    assert (lengths is not None) == norms
    got = sum((m + 1) * y.square().sum() for m, y in enumerate(found)) + sum(n.sum() for n in lengths or ())
    kept = [Features(f.dense() * (torch.arange(12) < 4), f.dense()) for f in code.features]
    want = d.decode(kept, x).square().sum() + 2 * d.decode(code.features, x).square().sum()
    want = want + sum(group.norms().sum() for group in d.groups if norms)
    weights = [group.W_dec for group in d.groups]
    one, two = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (got, want))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize("by", ["per_source", "per_target"])
@pytest.mark.parametrize("affine", [False, True])
def test_tied_decoders_have_prefixes_and_can_be_frozen(by, affine, products):
    wires = replace(wiring.clt([0, 1, 2], 4), tied=wiring.Tying(by, scale=affine, offset=affine))
    d = make.dictionary(wires, {"kind": "topk", "k": 6}, products=products, features=10)
    x = d.normalize_inputs(make.activations(wires, 9))
    features = d.encode(x)
    found, _ = d.decode_all([features], x, cuts=nested.cuts([0.4, 1.0], d.sizes, Shards()), frozen=[features])
    kept = [Features(v, v) for v in (f.dense() * (torch.arange(10) < 4) for f in features)]
    torch.testing.assert_close(found[0], d.decode(kept, x))
    torch.testing.assert_close(found[1], d.decode(features, x))
    torch.testing.assert_close(found[2], found[1] - d.b_dec)
    decoder = [p for name, p in d.named_parameters() if "W_dec" in name or "feature_" in name]
    found_grads = torch.autograd.grad(found[2].sum(), decoder, retain_graph=True)
    assert not any(grad.any() for grad in found_grads)
    assert torch.autograd.grad(found[2].sum(), d.groups[0].W_enc)[0].any()
