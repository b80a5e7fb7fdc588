"""Tied decoders against loops over sources, targets and features in float64, and against untied ones."""

from dataclasses import replace

import pytest
import torch

from tests.dictionary import make
from tests.equivalence import cases
from xlc_ray.config import Config, UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import Shards, checkpoint, wiring
from xlc_ray.dictionary.build import build, make_wiring, normalize_by
from xlc_ray.dictionary.fold import expanded_decoder, fold, untie
from xlc_ray.training import Learner

KINDS = [(by, affine) for by in ("per_source", "per_target") for affine in ("", "s", "o", "so")]
GATES = {
    "relu": {"kind": "relu"},
    "jumprelu": {"kind": "jumprelu", "threshold": 0.4, "bandwidth": 0.8},
    "topk": {"kind": "topk", "k": 3},
    "by_norm": {"kind": "topk", "k": 3, "rank_by": "decoder_norm"},
}


def tied_clt(by: str, affine: str, layers: int = 3, skip: bool = False):
    tying = wiring.Tying(by, scale="s" in affine, offset="o" in affine)
    return replace(wiring.clt(list(range(layers)), 4), skip=skip, tied=tying)


def tied(by: str, affine: str, gate: str = "relu", skip: bool = False, **changes):
    made = make.dictionary(tied_clt(by, affine, skip=skip), GATES[gate], **changes)
    noise = make.generator(9)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "feature_" in name:
                p += 0.5 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
    return made


def reference(d, by: str, features: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """ŷ by the formula, feature by feature."""
    targets, width = d.wiring.written_sites, 4
    y = d.b_dec.expand(len(x), -1).split(width, dim=1)
    y = list(y)
    for s, f in enumerate(features):
        for t in range(s, len(targets)):
            D = d.groups[s if by == "per_source" else t].W_dec
            for i in range(f.shape[1]):
                value = f[:, i]
                if d.groups[t].feature_offset is not None:
                    value = torch.where(value != 0, value + d.groups[t].feature_offset[i], value)
                if d.groups[t].feature_scale is not None:
                    value = value * d.groups[t].feature_scale[i]
                y[t] = y[t] + value[:, None] * D[i]
            if d.wiring.skip:
                own = slice((t - s) * width, (t - s + 1) * width)
                y[t] = y[t] + x[:, s * width : (s + 1) * width] @ d.W_skip[s][own].T
    return torch.cat(y, dim=1)


def gradients(d, loss) -> dict[str, torch.Tensor]:
    d.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in d.named_parameters()}


@pytest.mark.parametrize("products", ["dense", "sparse"])
@pytest.mark.parametrize(("by", "affine"), KINDS)
@pytest.mark.parametrize("gate", ["relu", "topk"])
def test_values_and_gradients_are_those_of_the_formula(by, affine, products, gate):
    d = tied(by, affine, gate, skip=True, products=products)
    batch = make.activations(d.wiring, 9)
    x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
    got = d.decode(d.encode(x), x)
    mask = [f.dense().detach() != 0 for f in d.encode(x)]
    pre = [x[:, 4 * g : 4 * g + 4] @ group.W_enc.T + group.b_enc for g, group in enumerate(d.groups)]
    want = reference(d, by, [p * m for p, m in zip(pre, mask, strict=True)], x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    one, two = (gradients(d, (v - y).square().sum()) for v in (got, want))
    assert any("feature_scale" in n for n in one) == ("s" in affine)
    for name, grad in two.items():
        assert grad.any(), name
        torch.testing.assert_close(one[name], grad, rtol=1e-10, atol=1e-9, msg=name)


def test_offsets_leave_the_gates_own_gradient_alone():
    """A JumpReLU teaches its threshold at entries below it, where f = 0."""
    plain, shifted = tied("per_source", "", "jumprelu"), tied("per_source", "o", "jumprelu")
    with torch.no_grad():
        for group in shifted.groups:
            group.feature_offset.zero_()
    batch = make.activations(plain.wiring, 9)
    found = []
    for d in (plain, shifted):
        x, y = d.normalize_inputs(batch), d.normalize_targets(batch)
        found.append(gradients(d, (d.decode(d.encode(x), x) - y).square().sum()))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


@pytest.mark.parametrize(("by", "affine"), KINDS)
def test_norms_are_those_of_the_expanded_rows(by, affine):
    d = tied(by, affine)
    for g in range(3):
        rows = expanded_decoder(d, g)
        assert rows.shape == (7, 4 * (3 - g))
        torch.testing.assert_close(d.norms(g), rows.norm(dim=1))
        columns = d.wiring.columns(d.wiring.writes[g])
        for site, own in columns.items():
            assert torch.equal(d.decoder_rows(g, site), rows[:, own])
    with torch.no_grad():
        for group in d.groups:
            group.W_dec.zero_()
    found = gradients(d, sum(d.norms(g).sum() for g in range(3)))
    assert all(torch.isfinite(v).all() for v in found.values())


@pytest.mark.parametrize(("by", "affine"), KINDS)
def test_a_site_alone_is_its_part_of_the_whole(by, affine):
    d = tied(by, affine, "by_norm", skip=True).eval()
    batch = make.activations(d.wiring, 20)
    normalize_by(d, settings.Normalization(kind="mean_std"), "clt", make.statistics(batch))
    d.gate.inference_threshold.fill_(0.3)
    features = {g: d.encode_group(g, batch) for g in range(3)}
    whole = d.reconstruct(batch)
    for t, site in enumerate(d.wiring.written_sites):
        alone = d.decode_site(site, {g: features[g] for g in range(t + 1)}, batch)
        torch.testing.assert_close(alone, whole[site], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("by", "affine"), [k for k in KINDS if "o" not in k[1]])
def test_untied_and_folded_they_compute_the_same(by, affine):
    d = tied(by, affine, "jumprelu", skip=True)
    batch = make.activations(d.wiring, 20)
    normalize_by(d, settings.Normalization(kind="mean_std"), "clt", make.statistics(batch))
    d.eval()
    for other in (untie(d), fold(d)):
        assert other.wiring.tied is None
        assert not other.training
        for site, value in d.reconstruct(batch).items():
            torch.testing.assert_close(other.reconstruct(batch)[site], value, rtol=1e-9, atol=1e-9)
    assert torch.equal(untie(d).groups[1].W_dec, expanded_decoder(d, 1))


def test_what_has_no_untied_form_is_said():
    with pytest.raises(UserError, match="feature_offset: no decoder row can hold"):
        fold(tied("per_target", "o"))


@pytest.mark.parametrize("by", ["per_source", "per_target"])
def test_they_start_with_the_asked_norm_and_fewer_weights(by):
    d = build(make.section(decoder_norm=0.3), tied_clt(by, "so"), 0, Shards())
    untied = build(make.section(decoder_norm=0.3), wiring.clt([0, 1, 2], 4), 0, Shards())
    count = [sum(g.W_dec.numel() for g in m.groups) for m in (d, untied)]
    assert count == [7 * 4 * 3, 7 * 4 * 6]
    torch.testing.assert_close(d.norms(0), torch.full((7,), 0.3))
    assert all((d.norms(g) <= 0.3 + 1e-6).all() for g in range(3))
    assert all((g.feature_scale == 1).all() and (g.feature_offset == 0).all() for g in d.groups)


@pytest.mark.parametrize("by", ["per_source", "per_target"])
def test_a_checkpoint_knows_that_decoders_are_tied(by, tmp_path):
    changes = {"dictionary.wiring": {"kind": "clt", "tied": by, "feature_scale": True, "skip": True}}
    config = cases.config({"kind": "topk", "k": 3}, {}, **changes).override({"out": str(tmp_path)})
    wires = make_wiring(config.dictionary.wiring, 3, 6)
    assert wires.skip
    assert wires.tied == wiring.Tying(by, scale=True, offset=False)
    learner = Learner(build(config.dictionary, wires, 3, Shards()), config)
    for batch in cases.batches(wires)[:3]:
        learner.train_step(batch, measure=False)
    learner.save(str(tmp_path))
    (tmp_path / "config.yaml").write_text(config.yaml())
    loaded, _ = checkpoint.load_dictionary(str(tmp_path))
    assert loaded.wiring == wires
    assert loaded.groups[1].feature_scale.ne(1).any()
    for name, value in learner.dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name
    again = Learner(build(config.dictionary, wires, 5, Shards()), config)
    again.resume(str(tmp_path), 3)
    batch = cases.batches(wires)[3]
    assert again.train_step(batch, measure=True) == learner.train_step(batch, measure=True)


@pytest.mark.parametrize("name", ["feature_scale", "feature_offset"])
def test_scales_and_offsets_need_tied_decoders(name):
    tree = cases.config({"kind": "relu"}, {}).model_dump(mode="json")
    tree["dictionary"]["wiring"] = {"kind": "clt", name: True}
    with pytest.raises(ValueError, match=f"{name}: only with tied: per_source or per_target"):
        Config.model_validate(tree)
