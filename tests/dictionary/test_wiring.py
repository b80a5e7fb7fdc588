"""The tables of every wiring by hand, and that decoding follows them."""

import pickle

import pytest
import torch
from hypothesis import given, settings

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as config
from xlc_ray.dictionary import Wiring, wiring
from xlc_ray.dictionary.build import make_wiring


def test_sae():
    wires = wiring.sae(["resid_post.1", "resid_post.4"], 3)
    assert wires.reads == wires.writes == (("resid_post.1",), ("resid_post.4",))
    assert wires.widths == {"resid_post.1": 3, "resid_post.4": 3}
    assert wires.read_spans(1) == wires.write_spans(1) == (slice(3, 6),)


def test_transcoders():
    wires = wiring.transcoders([0, 2], 3, skip=True)
    assert wires.reads == (("mlp_in.0",), ("mlp_in.2",))
    assert wires.writes == (("mlp_out.0",), ("mlp_out.2",))
    assert wires.skip
    assert wires.read_sites == ("mlp_in.0", "mlp_in.2")
    assert wires.written_sites == ("mlp_out.0", "mlp_out.2")
    assert wires.write_spans(1) == (slice(3, 6),)


def test_clt_writes_its_own_and_all_later_layers():
    wires = wiring.clt([0, 2, 3], 5)
    assert wires.reads == (("mlp_in.0",), ("mlp_in.2",), ("mlp_in.3",))
    assert wires.writes == (("mlp_out.0", "mlp_out.2", "mlp_out.3"), ("mlp_out.2", "mlp_out.3"), ("mlp_out.3",))
    assert [wires.width(row) for row in wires.writes] == [15, 10, 5]
    assert [wires.write_spans(g) for g in range(3)] == [(slice(0, 15),), (slice(5, 15),), (slice(10, 15),)]


@pytest.mark.parametrize(
    ("causality", "reads", "writes"),
    [
        ("acausal", ["abc"], ["abc"]),
        ("weak", ["a", "b", "c"], ["abc", "bc", "c"]),
        ("strict", ["a", "b"], ["bc", "c"]),
    ],
)
def test_crosscoder(causality, reads, writes):
    wires = wiring.crosscoder(list("abc"), 2, causality)
    assert wires.reads == tuple(map(tuple, reads))
    assert wires.writes == tuple(map(tuple, writes))
    assert "".join(wires.read_sites) == "".join(dict.fromkeys("".join(reads)))
    assert wires.written_sites == (("b", "c") if causality == "strict" else ("a", "b", "c"))


def test_spans_merge_neighbours_and_keep_the_order_of_reading():
    wires = Wiring({"a": 1, "b": 2, "c": 3, "d": 4}, (tuple("abd"), tuple("ca"), tuple("bcd")), (("a",),) * 3)
    assert wires.read_spans(0) == (slice(0, 3), slice(6, 10))
    assert wires.read_spans(1) == (slice(3, 6), slice(0, 1))
    assert wires.read_spans(2) == (slice(1, 10),)


def test_parts_are_groups_that_share_written_sites_and_their_columns():
    assert wiring.sae(["a", "b"], 3).parts == (((slice(0, 3),), (0,)), ((slice(3, 6),), (1,)))
    assert wiring.transcoders([0, 2], 3, skip=True).parts == (((slice(0, 3),), (0,)), ((slice(3, 6),), (1,)))
    for wires in (wiring.clt([0, 1], 3), *(wiring.crosscoder(["a", "b"], 3, c) for c in ("acausal", "weak"))):
        assert wires.parts == (((slice(0, 6),), tuple(range(wires.groups))),)
    # d alone; b; a and c by way of the last group
    rows = (("d",), ("c",), ("b",), ("a",), ("c", "a"))
    mixed = Wiring({"a": 1, "b": 2, "c": 3, "d": 4}, rows, rows)
    assert mixed.parts == (
        ((slice(0, 1), slice(3, 6)), (1, 3, 4)),
        ((slice(1, 3),), (2,)),
        ((slice(6, 10),), (0,)),
    )


@pytest.mark.parametrize(
    ("reads", "writes", "skip"),
    [
        ((), (), False),
        ((("a",),), (("a",), ("b",)), False),
        (((),), (("a",),), False),
        ((("a", "a"),), (("a",),), False),
        ((("z",),), (("a",),), False),
        ((("a",),), (("z",),), False),
        ((("a", "b"),), (("a",),), True),
    ],
)
def test_bad_wirings_raise(reads, writes, skip):
    with pytest.raises(ValueError, match=r"sites|width|skip"):
        Wiring({"a": 2, "b": 2}, reads, writes, skip)


@pytest.mark.parametrize("writes", [(("a", "c"),), (("a",), ("c",), ("c",)), (("a",), ("b",))])
def test_tied_decoders_need_a_group_a_written_site_and_one_width(writes):
    widths, reads = {"a": 2, "b": 3, "c": 2}, (("a",),) * len(writes)
    assert Wiring(widths, reads, writes).tied is None
    with pytest.raises(ValueError, match="tied decoders need as many groups as written sites, and those of one width"):
        Wiring(widths, reads, writes, tied=wiring.Tying("per_source", scale=False, offset=False))


def test_widths_cannot_change_and_wirings_travel():
    widths = {"a": 2}
    wires = Wiring(widths, (("a",),), (("a",),))
    widths["a"] = 5
    assert wires.widths["a"] == 2
    with pytest.raises(TypeError):
        wires.widths["a"] = 3
    assert pickle.loads(pickle.dumps(wires)) == wires


def test_make_wiring_takes_layers_from_the_settings():
    chosen = make_wiring(config.SaeWiring(site="attn_out", layers=(1, 3)), 4, 8)
    assert chosen.reads == (("attn_out.1",), ("attn_out.3",))
    assert make_wiring(config.CltWiring(), 3, 8) == wiring.clt([0, 1, 2], 8)
    assert make_wiring(config.TranscoderWiring(skip=True), 2, 8) == wiring.transcoders([0, 1], 8, True)
    crosscoder = make_wiring(config.CrosscoderWiring(causality="strict"), 3, 8)
    assert crosscoder == wiring.crosscoder(["resid_post.0", "resid_post.1", "resid_post.2"], 8, "strict")


def test_make_wiring_refuses_layers_that_are_not_there():
    with pytest.raises(UserError, match=r"dictionary.wiring.layers.*no layer 4; allowed: 0 to 3"):
        make_wiring(config.CltWiring(layers=(1, 4)), 4, 8)
    for layers in ((1, 1), (2, 1)):
        with pytest.raises(UserError, match=r"dictionary.wiring.layers.*must rise"):
            make_wiring(config.CltWiring(layers=layers), 4, 8)
    with pytest.raises(UserError, match="at least two layers"):
        make_wiring(config.CrosscoderWiring(causality="strict", layers=(1,)), 4, 8)


def _encode_by_loops(d, batch):
    found = []
    for g, group in enumerate(d.groups):
        pre, start = group.b_enc.clone().expand(len(next(iter(batch.values()))), -1), 0
        for site in d.wiring.reads[g]:
            width = d.wiring.widths[site]
            pre = pre + batch[site] @ group.W_enc[:, start : start + width].T
            start += width
        found.append(pre)
    return found


def _decode_by_loops(d, features):
    columns, out = d.wiring.columns(d.wiring.written_sites), {}
    for site, where in columns.items():
        out[site] = d.b_dec[where].clone()
        for g, group in enumerate(d.groups):
            start = 0
            for target in d.wiring.writes[g]:
                width = d.wiring.widths[target]
                if target == site:
                    out[site] = out[site] + features[g] @ group.W_dec[:, start : start + width]
                start += width
    return torch.cat(list(out.values()), dim=1)


@settings(deadline=None, max_examples=30)
@given(make.wirings())
def test_encode_and_decode_are_explicit_loops_over_groups_and_sites(wires):
    batch = make.activations(wires, 5)
    for products in ("dense", "sparse"):
        d = make.dictionary(wires, features=4, products=products)
        x = d.normalize_inputs(batch)
        features = d.encode(x)
        want = [pre.clamp(min=0) for pre in _encode_by_loops(d, batch)]
        for f, expected in zip(features, want, strict=True):
            torch.testing.assert_close(f.dense(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.decode(features, x), _decode_by_loops(d, want), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(make.wirings())
def test_one_group_and_one_site_at_a_time_give_the_whole(wires):
    """The causal replacement model decodes site by site from groups encoded one by one."""
    batch = make.activations(wires, 5)
    for gate in ({"kind": "relu"}, {"kind": "topk", "k": 2, "pool": "group", "rank_by": "decoder_norm"}):
        d = make.dictionary(wires, gate, features=4).eval()
        for name in ("read", "write"):
            getattr(d, f"{name}_mean").copy_(make.random(*getattr(d, f"{name}_mean").shape, seed=3))
            getattr(d, f"{name}_scale").copy_(make.random(*getattr(d, f"{name}_scale").shape, seed=4).exp())
        whole, features = d.reconstruct(batch), d.encode(d.normalize_inputs(batch))
        alone = {}
        for g, f in enumerate(features):
            alone[g] = d.encode_group(g, {site: batch[site] for site in wires.reads[g]})
            torch.testing.assert_close(alone[g].dense(), f.dense(), rtol=1e-12, atol=1e-12)
        for site, want in whole.items():
            writers = {g: alone[g] for g in range(wires.groups) if site in wires.writes[g]}
            torch.testing.assert_close(d.decode_site(site, writers, batch), want, rtol=1e-12, atol=1e-12)


def test_one_group_measures_no_decoder_but_its_own(monkeypatch):
    wires = wiring.clt([0, 1, 2], 3)
    gate = {"kind": "batchtopk", "k": 2, "rank_by": "decoder_norm", "pool": "all"}
    d, measured = make.dictionary(wires, gate).eval(), []
    plain = d.norms
    monkeypatch.setattr(d, "norms", lambda g: measured.append(g) or plain(g))
    d.encode_group(1, make.activations(wires, 5))
    assert measured == [1]


def test_skip_connections_are_linear_from_input_to_output():
    wires = wiring.transcoders([0, 1], 3, skip=True)
    d, batch = make.dictionary(wires), make.activations(wires, 5)
    x = d.normalize_inputs(batch)
    features = d.encode(x)
    got = d.decode(features, x)
    for layer in (0, 1):
        where = slice(3 * layer, 3 * layer + 3)
        want = features[layer].dense() @ d.groups[layer].W_dec + batch[f"mlp_in.{layer}"] @ d.W_skip[layer].T
        torch.testing.assert_close(got[:, where], want + d.b_dec[where])
    d.eval()
    alone = {g: d.encode_group(g, batch) for g in (0, 1)}
    whole = d.reconstruct(batch)
    for site, want in whole.items():
        torch.testing.assert_close(d.decode_site(site, alone, batch), want)
