"""Decoder norms folded into features: unit rows, the same reconstruction, features times the old norms."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.dictionary import wiring
from xlc_ray.dictionary.fold import fold_decoder_norms

GATES = {
    "relu": {"kind": "relu"},
    "log": {"kind": "jumprelu", "threshold": 0.4},
    "direct": {"kind": "jumprelu", "threshold": 0.4, "parameterisation": "direct"},
    "crosslayer": {"kind": "jumprelu", "threshold": 0.4, "parameterisation": "crosslayer"},
    "topk_norm": {"kind": "topk", "k": 2, "pool": "group", "rank_by": "decoder_norm"},
    "batchtopk_norm": {"kind": "batchtopk", "k": 2, "rank_by": "decoder_norm", "threshold_start": 0},
}


@pytest.mark.parametrize("gate", GATES)
def test_rows_become_units_and_features_carry_their_norms(gate):
    wires = wiring.clt([0, 1, 2], 3)
    d, x = make.dictionary(wires, GATES[gate]), make.random(40, 9)
    with torch.no_grad():
        for n, group in enumerate(d.groups):
            group.W_dec.mul_(torch.rand(7, 1, generator=make.generator(n), dtype=torch.float64) * 3 + 0.1)
            group.W_dec[2] = 0
    d.analyse(x)
    d.gate.finish_step(1)
    folded = fold_decoder_norms(d)
    d.eval()
    want, got = d.encode(x), folded.encode(x)
    for a, b, group, unit in zip(got, want, d.groups, folded.groups, strict=True):
        norms = group.norms()
        assert torch.allclose(unit.norms(), (norms > 0).double())
        torch.testing.assert_close(a.dense(), b.dense() * norms, rtol=1e-9, atol=1e-12)
        assert 0 < a.l0().sum() < a.dense().numel()
    torch.testing.assert_close(folded.decode(got, x), d.decode(want, x), rtol=1e-9, atol=1e-9)


def test_gates_that_rank_activations_are_refused():
    d = make.dictionary(wiring.sae(["a"], 4), {"kind": "batchtopk", "k": 2})
    with pytest.raises(UserError, match="allowed: decoder_norm, or convert to jumprelu first"):
        fold_decoder_norms(d)


@pytest.mark.parametrize(
    ("gate", "name"),
    [({"kind": "topk", "k": 2, "rank_by": "zscore"}, "rank_by: zscore"), ({"kind": "hard_concrete"}, "HardConcrete")],
)
def test_gates_that_do_not_scale_are_refused(gate, name):
    d = make.dictionary(wiring.sae(["a"], 4), gate)
    with pytest.raises(UserError, match=f"fold into jumprelu, relu and topk, not {name}"):
        fold_decoder_norms(d)


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_entries_are_the_nonzero_ones_dense_or_sparse(products):
    d = make.dictionary(wiring.sae(["a"], 4), {"kind": "jumprelu", "threshold": 0.4}, products=products).eval()
    (features,) = d.encode(make.random(20, 4))
    token, feature, value = features.entries()
    assert torch.equal(torch.stack([token, feature]).T, features.dense().nonzero())
    assert torch.equal(features.dense()[token, feature], value)
    assert len(value) > 0
