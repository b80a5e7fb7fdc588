"""TopK and BatchTopK → JumpReLU, so that a feature depends on its own token alone and any tool can load it.

Thresholds are estimated on training rows and then scaled a group, so that the group's L0 stays what the gate's
training form keeps (or its share of a target): see thresholds.py. Everything else of the dictionary stays as it is.

    l0     active features a token
    nmse   Σ‖x - x̂‖² / Σ‖x - x̄‖²  (= fvu); a site's in raw units, the total in normalised units
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations import source
from xlc_ray.activations.order import Order
from xlc_ray.activations.store import Store
from xlc_ray.config import Config, UserError
from xlc_ray.config.dictionary import CltWiring
from xlc_ray.dictionary import Dictionary
from xlc_ray.dictionary.fold import fold, fold_decoder_norms
from xlc_ray.dictionary.gates import JumpReLU, TopK
from xlc_ray.evaluation.held_out import held_out_batches
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction
from xlc_ray.evaluation.thresholds import (
    SCALES,
    Kept,
    Ladder,
    feature_thresholds,
    pool_thresholds,
    with_gate,
    with_thresholds,
)

Rows = Callable[[], Iterator[dict[str, Tensor]]]
"""Starts a pass over batches {site: [B, width]} in raw units."""


@dataclass(frozen=True)
class Conversion:
    """A converted dictionary on the CPU in inference form, the settings that describe it, and what it cost."""

    dictionary: Dictionary
    config: Config
    report: dict[str, Any]


def convert_dictionary(
    dictionary: Dictionary,
    config: Config,
    training: Store,
    held_out: Store | None,
    *,
    per_feature: bool,
    target_l0: float | None,
    tolerance: float,
    folded: bool,
    device: str | torch.device = "cpu",
) -> Conversion:
    """Convert a whole dictionary to the gate jumprelu.

    Reads up to `train.calibration_tokens` training rows in batches of `train.batch_tokens`, as training does, and
    measures before and after on `evaluate.tokens` held-out rows (`held_out` None: on those training rows). `target_l0`
    counts all groups (None: what the gate keeps in training); `tolerance` is the largest difference from it, of which
    each group may take an equal part. `folded`: fold normalisation and decoder norms into the weights, which unties
    tied decoders. Raises UserError for a gate without thresholds to find, a store without the sites, and a target that
    no scale in [0.1, 10] reaches.
    """
    _check(dictionary, training, target_l0, tolerance)
    dictionary = dictionary.to(device).eval()
    rows = _training_rows(config, training, dictionary)
    kept = _estimate(dictionary, rows)
    targets = _targets(kept, target_l0)
    thetas = pool_thresholds(dictionary, kept)
    if per_feature:
        thetas = feature_thresholds(kept, thetas)
    found = _calibrate(dictionary, rows, thetas, targets, tolerance / len(kept))
    thetas = [(theta.double() * scale).to(theta) for theta, (scale, _) in zip(thetas, found, strict=True)]
    made = with_thresholds(dictionary, thetas)
    measured = rows if held_out is None else _held_out_rows(config, held_out, dictionary)
    before, after = (evaluate_reconstruction(each, measured()).compute() for each in (dictionary, made))
    report = {
        "gate": config.dictionary.gate.kind,
        "thresholds": _kind(dictionary, per_feature),
        "folded": folded,
        "tolerance": tolerance,
        "calibration_tokens": kept[0].tokens,
        "measured_on": "training rows" if held_out is None else "held-out rows",
        **_report(made, targets, found, before, after),
    }
    made = copy.deepcopy(made).cpu()
    changes: dict[str, Any] = {"dictionary.gate": _settings(thetas)}
    if folded:
        made = fold_decoder_norms(fold(made))
        changes["dictionary.normalization"] = {"kind": "none", "center": False}
        if isinstance(config.dictionary.wiring, CltWiring):
            changes |= {"dictionary.wiring.tied": None, "dictionary.wiring.feature_scale": False}
    return Conversion(made, config.override(changes), report)


def _check(dictionary: Dictionary, training: Store, target_l0: float | None, tolerance: float) -> None:
    if not isinstance(dictionary.gate, TopK | JumpReLU):
        raise UserError(
            f"convert: the gate {type(dictionary.gate).__name__} has no threshold to find; "
            "allowed: topk, batchtopk, jumprelu"
        )
    if isinstance(dictionary.gate, TopK) and dictionary.gate.zscores:
        raise UserError(
            "dictionary.gate.rank_by: zscore keeps pre-activations of any sign, which jumprelu cannot; "
            "allowed: activation, decoder_norm"
        )
    if not tolerance > 0:
        raise UserError(f"--tolerance: {tolerance:g} should be greater than 0")
    if target_l0 is not None and not target_l0 > 0:
        raise UserError(f"--target-l0: {target_l0:g} should be greater than 0")
    if lacking := [site for site in dictionary.wiring.sites if site not in training.manifest.sites]:
        known = ", ".join(training.manifest.sites)
        raise UserError(f"{training.path}: the store has no site {lacking[0]}; it has: {known}")


def _training_rows(config: Config, store: Store, dictionary: Dictionary) -> Rows:
    """Whole batches of the size that the gate ranked in training, of one epoch at most, but one batch at least."""
    size = config.train.batch_tokens // config.train.accumulate
    read = config.source
    order = Order(store.kept_rows, config.seed, read.slice_rows, read.window_slices, read.mix_chunks)
    batches = max(1, min(config.train.calibration_tokens, order.epoch_rows) // size)
    return lambda: source.batches(store, order, dictionary.wiring.sites, source.Share(size, 0, batches))


def _held_out_rows(config: Config, store: Store, dictionary: Dictionary) -> Rows:
    settings = config.evaluate
    return lambda: held_out_batches(store, dictionary.wiring.sites, settings.batch_tokens, settings.tokens)


@torch.no_grad()
def _estimate(dictionary: Dictionary, rows: Rows) -> list[Kept]:
    """One pass in the gate's training form, in which a batch shares its places; JumpReLU as it is."""
    gate, device = dictionary.gate, dictionary.b_dec.device
    own_gate = copy.deepcopy(gate)  # selecting leaves traces in a gate in training form
    seen = with_gate(dictionary, own_gate.train(not isinstance(gate, JumpReLU)))
    norms = [seen.norms(g) if gate.needs_norms else None for g in range(len(seen.groups))]
    kept = [Kept.empty(n) for n in seen.sizes]
    for batch in rows():
        x = seen.normalize_inputs({site: values.to(device) for site, values in batch.items()})
        for own, features, norm in zip(kept, seen.encode(x), norms, strict=True):
            own.update(features, norm)
    return kept


def _targets(kept: list[Kept], target_l0: float | None) -> list[float]:
    """L0 of each group: what is kept, or its share of a target."""
    l0 = [own.l0 for own in kept]
    if not sum(l0):
        raise UserError("convert: no feature is active on the training rows; nothing to calibrate")
    return l0 if target_l0 is None else [target_l0 * own / sum(l0) for own in l0]


@torch.no_grad()
def _calibrate(
    dictionary: Dictionary, rows: Rows, thetas: list[Tensor], targets: list[float], tolerance: float
) -> list[tuple[float, float]]:
    """(scale, L0 there) of each group. One pass with the lowest thresholds of all shows every entry that matters."""
    device = dictionary.b_dec.device
    lowest = with_thresholds(dictionary, [(theta.double() * SCALES[0]).to(theta) for theta in thetas])
    ladders = [Ladder.empty() for _ in thetas]
    for batch in rows():
        x = lowest.normalize_inputs({site: values.to(device) for site, values in batch.items()})
        for ladder, features, theta in zip(ladders, lowest.encode(x), thetas, strict=True):
            ladder.update(features, theta)
    names = [", ".join(reads) for reads in dictionary.wiring.reads]
    return [
        ladder.scale(target, tolerance, f"group {g} ({name})")
        for g, (ladder, target, name) in enumerate(zip(ladders, targets, names, strict=True))
    ]


def _report(
    made: Dictionary,
    targets: list[float],
    found: list[tuple[float, float]],
    before: dict[str, Any],
    after: dict[str, Any],
) -> dict[str, Any]:
    """The numbers of a conversion: in all, of each site and of each group."""
    assert isinstance(made.gate, JumpReLU)
    wiring, sites = made.wiring, {}
    for site, now in after["sites"].items():
        sites[site] = {"before": before["sites"][site]["fvu"], "after": now["fvu"]}
    groups = [
        {
            "reads": list(wiring.reads[g]),
            "writes": list(wiring.writes[g]),
            "target_l0": targets[g],
            "calibrated_l0": reached,
            "scale": scale,
            "threshold": float(made.gate.threshold(g).detach().mean()),
            "l0_before": before["groups"][g]["l0"],
            "l0_after": after["groups"][g]["l0"],
        }
        for g, (scale, reached) in enumerate(found)
    ]
    return {
        "target_l0": sum(targets),
        "calibrated_l0": sum(reached for _, reached in found),
        "tokens": after["tokens"],
        "l0": {"before": before["l0"], "after": after["l0"]},
        "nmse": {"before": before["fvu"], "after": after["fvu"]},
        "sites": sites,
        "groups": groups,
    }


def _kind(dictionary: Dictionary, per_feature: bool) -> str:
    if per_feature:
        return "per feature: mean of the least value kept in a batch"
    gate = dictionary.gate
    if isinstance(gate, JumpReLU):
        return "the gate's own"
    assert isinstance(gate, TopK)
    return "the gate's running mean" if gate.shared else "mean of the least score kept of a token"


def _settings(thetas: list[Tensor]) -> dict[str, Any]:
    """The gate's section: its one threshold is the mean, those that count are in the checkpoint."""
    mean = float(torch.cat([theta.double() for theta in thetas]).mean())
    start = {"threshold": mean} if mean > 0 else {}
    return {"kind": "jumprelu", "parameterisation": "direct", **start}


def conversion_table(report: dict[str, Any]) -> str:
    """The report for a terminal: a line a group, then a line a site. No trailing newline."""
    names = [", ".join(group["reads"][:2]) + (", …" if len(group["reads"]) > 2 else "") for group in report["groups"]]
    wide = max(len(name) for name in (*names, *report["sites"], "all")) + 2
    lines = [f"{'l0':<{wide}}{'target':>9}{'scale':>9}{'threshold':>11}{'before':>9}{'after':>9}"]
    for name, group in zip(names, report["groups"], strict=True):
        lines.append(
            f"{name:<{wide}}{group['target_l0']:>9.3f}{group['scale']:>9.4f}{group['threshold']:>11.4g}"
            f"{group['l0_before']:>9.3f}{group['l0_after']:>9.3f}"
        )
    total = report["l0"]
    lines += [f"{'all':<{wide}}{report['target_l0']:>9.3f}{'':>20}{total['before']:>9.3f}{total['after']:>9.3f}", ""]
    lines.append(f"{'nmse':<{wide}}{'':>29}{'before':>9}{'after':>9}")
    for name, found in (*report["sites"].items(), ("all", report["nmse"])):
        before, after = ("n/a" if v is None else f"{v:.4f}" for v in (found["before"], found["after"]))
        lines.append(f"{name:<{wide}}{'':>29}{before:>9}{after:>9}")
    lines += [
        "",
        f"thresholds: {report['thresholds']}, scaled on {report['calibration_tokens']:,} training rows to an l0 of "
        f"{report['calibrated_l0']:.3f}; before and after on {report['tokens']:,} {report['measured_on']}",
    ]
    return "\n".join(lines)
