"""Settings → dictionary: the same rows at any number of ranks, what starts how, and what is refused."""

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, gates, wiring
from xlc_ray.dictionary.build import build, make_gate

CLT = wiring.clt([0, 1], 4)
SAE = wiring.sae(["a", "b"], 4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("features", [10, 600])
def test_the_same_seed_gives_the_same_rows_at_any_number_of_ranks(ranks, features):
    """Pitfall 4; and 5: a rank allocates its own slice only."""
    config = make.section({"kind": "jumprelu"}, features=features)
    whole = dict(build(config, CLT, 5, Shards()).named_parameters())
    parts = [build(config, CLT, 5, Shards(rank=r, size=ranks)) for r in range(ranks)]
    named = [dict(p.named_parameters()) for p in parts]
    for name, want in whole.items():
        pieces = [n[name] for n in named]
        if parts[0].is_sharded(name):
            assert max(len(p) for p in pieces) == -(-features // ranks)
            assert torch.equal(torch.cat(pieces), want), name
        else:
            assert all(torch.equal(p, want) for p in pieces), name


def test_groups_and_seeds_differ_and_a_seed_repeats():
    one, again, other = (build(make.section(), SAE, seed, Shards()) for seed in (1, 1, 2))
    assert torch.equal(one.groups[0].W_dec, again.groups[0].W_dec)
    assert not torch.equal(one.groups[0].W_dec, one.groups[1].W_dec)
    assert not torch.equal(one.groups[0].W_dec, other.groups[0].W_dec)


def test_more_features_begin_with_the_same_rows():
    few, many = (build(make.section(features=n), CLT, 0, Shards()) for n in (300, 900))
    assert torch.equal(many.groups[1].W_enc[:300], few.groups[1].W_enc)
    assert len(many.groups[1].W_dec.unique(dim=0)) == 900


def test_a_decoder_row_has_the_asked_norm_over_all_its_sites():
    d = build(make.section(decoder_norm=0.25), CLT, 0, Shards())
    for group in d.groups:
        torch.testing.assert_close(group.norms(), torch.full((7,), 0.25))
        torch.testing.assert_close(group.W_enc.norm(dim=1), torch.ones(7))
        assert not group.b_enc.any()
    unit = build(make.section(decoder_norm=0.25, unit_norm=True), CLT, 0, Shards())
    torch.testing.assert_close(unit.groups[0].norms(), torch.ones(7))


def test_the_encoder_starts_as_a_copy_where_the_sites_allow_it():
    tied = build(make.section(), SAE, 0, Shards())
    assert all(torch.equal(g.W_enc, g.W_dec) for g in tied.groups)
    tied.groups[0].W_enc.data.zero_()
    assert tied.groups[0].W_dec.any()  # a copy, not the same tensor
    loose = build(make.section(tie_encoder_init=False), SAE, 0, Shards())
    assert not torch.equal(loose.groups[0].W_enc, loose.groups[0].W_dec)
    assert torch.equal(loose.groups[0].W_dec, build(make.section(), SAE, 0, Shards()).groups[0].W_dec)


def test_every_gate_gets_its_settings():
    jump = make_gate(settings.JumpReluGate(threshold=0.3, bandwidth=1.5, parameterisation="direct"), [2, 3], Shards())
    assert isinstance(jump, gates.JumpReLU)
    assert (jump.bandwidth, jump.log, jump.to_pre, jump.by_value) == (1.5, False, False, False)
    assert [t.tolist() for t in jump.raw_threshold] == [pytest.approx([0.3] * 2), pytest.approx([0.3] * 3)]
    topk = make_gate(settings.TopKGate(k=3, rank_by="decoder_norm", threshold_start=7), [5, 5], Shards())
    assert (topk.k, topk.over_batch, topk.over_groups, topk.needs_norms, topk.start) == (3, False, True, True, 7)
    batch = make_gate(settings.BatchTopKGate(k=3, pool="group", threshold_decay=0.5), [5, 5], Shards())
    assert (batch.over_batch, batch.over_groups, batch.needs_norms, batch.decay) == (True, False, False, 0.5)
    alone = make_gate(settings.TopKGate(k=3), [5], Shards())
    assert not alone.shared  # one group: "all" is that group, exact at inference too


def test_what_cannot_be_built_is_refused():
    with pytest.raises(UserError, match=r"dictionary.gate.k: 15 exceeds the 14 features"):
        build(make.section({"kind": "topk", "k": 15}), CLT, 0, Shards())
    assert build(make.section({"kind": "topk", "k": 14}), CLT, 0, Shards()).gate.k == 14
    with pytest.raises(UserError, match=r"tensor_parallel: 4 ranks cannot share the 5 features"):
        build(make.section(features=5), CLT, 0, Shards(rank=0, size=4))  # 2 + 2 + 1 + 0
    assert len(build(make.section(features=5), CLT, 0, Shards(rank=2, size=3)).groups[0].W_dec) == 1
