"""Each kind of normalisation by what it promises, and that missing statistics stop the run (pitfall 14)."""

import dataclasses
import math

import pytest
import torch

from tests.dictionary import make
from xlc_ray.config import UserError
from xlc_ray.config import dictionary as settings
from xlc_ray.dictionary import wiring
from xlc_ray.dictionary.build import normalize_by
from xlc_ray.dictionary.normalization import affine

WIDTHS = {"a": 3, "b": 5}
BATCH = make.activations(wiring.Wiring(WIDTHS, (("a", "b"),), (("b",),)), 500)
STATS = make.statistics(BATCH)


def applied(kind: str, center: bool) -> dict[str, torch.Tensor]:
    """The batch in normalised units, which came with its own statistics."""
    mean, scale = affine(kind, center, ("b", "a"), WIDTHS, STATS)
    x = (torch.cat([BATCH["b"], BATCH["a"]], dim=1) - mean) / scale
    return {"b": x[:, :5], "a": x[:, 5:]}


@pytest.mark.parametrize("center", [False, True])
def test_rms_makes_the_mean_square_norm_the_width(center):
    for site, x in applied("rms", center).items():
        assert x.square().sum(dim=1).mean().item() == pytest.approx(WIDTHS[site], rel=1e-12)
        assert (x.mean(dim=0).abs().max() < 1e-12) == center


@pytest.mark.parametrize("center", [False, True])
def test_unit_makes_the_mean_square_norm_one(center):
    for x in applied("unit", center).values():
        assert x.square().sum(dim=1).mean().item() == pytest.approx(1, rel=1e-12)
        assert (x.mean(dim=0).abs().max() < 1e-12) == center


def test_mean_norm_makes_the_mean_norm_the_root_of_the_width():
    for site, x in applied("mean_norm", False).items():
        assert x.norm(dim=1).mean().item() == pytest.approx(math.sqrt(WIDTHS[site]), rel=1e-12)


def test_mean_std_standardises_every_dimension():
    for x in applied("mean_std", True).values():
        assert x.mean(dim=0).abs().max() < 1e-12
        torch.testing.assert_close(x.std(dim=0), torch.ones_like(x[0]), rtol=1e-5, atol=0)
    _, scale = affine("mean_std", True, ("a",), WIDTHS, STATS)
    torch.testing.assert_close(scale, BATCH["a"].std(dim=0, unbiased=True) + 1e-6, rtol=1e-12, atol=0)


def test_none_needs_no_statistics_and_none_centred_does():
    mean, scale = affine("none", False, ("a",), WIDTHS, {})
    assert not mean.any()
    assert (scale == 1).all()
    mean, scale = affine("none", True, ("a",), WIDTHS, STATS)
    torch.testing.assert_close(mean, BATCH["a"].mean(dim=0))
    assert (scale == 1).all()
    with pytest.raises(UserError, match="no statistics of a"):
        affine("none", True, ("a",), WIDTHS, {})


@pytest.mark.parametrize("kind", ["rms", "mean_norm", "mean_std"])
def test_missing_statistics_stop(kind):
    with pytest.raises(UserError, match="no statistics of b"):
        affine(kind, kind == "mean_std", ("a", "b"), WIDTHS, {"a": STATS["a"]})


def test_a_store_without_norms_and_a_constant_site_stop():
    with pytest.raises(UserError, match=r"mean_norm needs E\|x\| of a.*use rms"):
        affine("mean_norm", False, ("a",), WIDTHS, {"a": dataclasses.replace(STATS["a"], mean_norm=None)})
    constant = make.statistics({"a": torch.ones(9, 3).double()})
    with pytest.raises(UserError, match="a is constant"):
        affine("rms", True, ("a",), WIDTHS, constant)


@pytest.mark.parametrize(
    ("kind", "wired", "center", "centred"),
    [
        ("rms", "clt", None, True),
        ("rms", "transcoder", None, True),
        ("rms", "sae", None, False),
        ("unit", "clt", None, True),
        ("unit", "sae", None, False),
        ("rms", "crosscoder", None, False),
        ("rms", "sae", True, True),
        ("rms", "clt", False, False),
        ("mean_norm", "clt", None, False),
        ("none", "clt", None, False),
        ("mean_std", "sae", None, True),
    ],
)
def test_who_is_centred(kind, wired, center, centred):
    wires = wiring.Wiring(WIDTHS, (("a",),), (("b",),))
    d = make.dictionary(wires)
    normalize_by(d, settings.Normalization(kind=kind, center=center), wired, STATS)
    assert bool(d.read_mean.any()) == bool(d.write_mean.any()) == centred
    x, y = d.normalize_inputs(BATCH), d.normalize_targets(BATCH)
    assert (x.mean(dim=0).abs().max() < 1e-10) == centred
    assert (y.mean(dim=0).abs().max() < 1e-10) == centred
    torch.testing.assert_close(d.denormalize(y)["b"], BATCH["b"])


def test_mean_norm_is_never_centred():
    d = make.dictionary(wiring.Wiring(WIDTHS, (("a",),), (("b",),)))
    with pytest.raises(UserError, match="mean_norm is not centred"):
        normalize_by(d, settings.Normalization(kind="mean_norm", center=True), "clt", STATS)


def test_mean_std_cannot_be_uncentred_silently():
    d = make.dictionary(wiring.Wiring(WIDTHS, (("a",),), (("b",),)))
    with pytest.raises(UserError, match="mean_std is always centred"):
        normalize_by(d, settings.Normalization(kind="mean_std", center=False), "sae", STATS)
