"""A folded dictionary knows no scale and no centre, and computes the same."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Wiring, wiring
from xlc_ray.dictionary.build import normalize_by
from xlc_ray.dictionary.fold import fold

WIRINGS = {
    "sae": wiring.sae(["a", "b"], 4),
    "skip": wiring.transcoders([0, 1], 4, skip=True),
    "clt": wiring.clt([0, 1, 2], 3),
    "acausal": wiring.crosscoder(["a", "b"], 4, "acausal"),
    "ragged": Wiring({"a": 3, "b": 5, "c": 4}, (("a",), ("c", "a")), (("c", "a"), ("b",))),
}
NORMALIZATIONS = [
    ("none", False),
    ("none", True),
    ("rms", False),
    ("rms", True),
    ("mean_norm", False),
    ("mean_std", True),
]
GATES = {
    "relu": {"kind": "relu"},
    "jumprelu": {"kind": "jumprelu", "threshold": 0.4},
    "topk_group": {"kind": "topk", "k": 2, "pool": "group"},
    "topk_all": {"kind": "topk", "k": 3, "threshold_start": 0},
    "batchtopk": {"kind": "batchtopk", "k": 2, "threshold_start": 0},
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("wired", WIRINGS)
def test_folding_changes_neither_features_nor_reconstructions(wired, gate):
    wires = WIRINGS[wired]
    batch = make.activations(wires, 50)
    for kind, center in NORMALIZATIONS:
        d = make.dictionary(wires, GATES[gate])
        normalize_by(d, settings.Normalization(kind=kind, center=center), "sae", make.statistics(batch))
        d.analyse(d.normalize_inputs(batch))
        d.gate.finish_step(1)
        before = {name: value.clone() for name, value in d.state_dict().items()}
        folded = fold(d)
        d.eval()
        want, got = d.encode(d.normalize_inputs(batch)), folded.encode(folded.normalize_inputs(batch))
        assert any(0 < f.l0().sum() < f.dense().numel() for f in want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-9, atol=1e-9)
        for site, value in d.reconstruct(batch).items():
            torch.testing.assert_close(folded.reconstruct(batch)[site], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(folded.normalize_inputs(batch), torch.cat([batch[s] for s in wires.read_sites], dim=1))
        assert torch.equal(folded.normalize_targets(batch), torch.cat([batch[s] for s in wires.written_sites], dim=1))
        assert not folded.training
        assert all(torch.equal(value, before[name]) for name, value in d.state_dict().items())  # a new one


def test_the_weights_are_in_raw_units():
    wires = Wiring({"a": 2, "b": 3}, (("a",),), (("b",),), skip=True)
    d, batch = make.dictionary(wires, features=4), make.activations(wires, 50)
    normalize_by(d, settings.Normalization(kind="mean_std"), "transcoder", make.statistics(batch))
    f = fold(d)
    pre = batch["a"] @ f.groups[0].W_enc.T + f.groups[0].b_enc
    out = pre.clamp(min=0) @ f.groups[0].W_dec + batch["a"] @ f.W_skip[0].T + f.b_dec
    torch.testing.assert_close(out, d.eval().reconstruct(batch)["b"])


def test_folding_keeps_the_precision_of_the_weights():
    wires = wiring.sae(["a"], 4)
    d, batch = make.dictionary(wires).float(), {k: v.float() for k, v in make.activations(wires, 50).items()}
    normalize_by(d, settings.Normalization(), "clt", make.statistics(batch))
    folded = fold(d)
    assert {p.dtype for p in folded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(folded.reconstruct(batch)["a"], d.eval().reconstruct(batch)["a"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_gates_that_compare_decoder_norms_cannot_be_folded(kind):
    d = make.dictionary(wiring.sae(["a"], 4), {"kind": kind, "k": 2, "rank_by": "decoder_norm"})
    with pytest.raises(UserError, match="rank_by: activation"):
        fold(d)
