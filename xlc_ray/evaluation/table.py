"""The evaluation as a short table for the terminal, and the words for its numbers that the report shares."""

from __future__ import annotations

from typing import Any

FORMATS = {
    "explained_variance": ".4f",
    "fvu": ".4f",
    "l0": ".1f",
    "dead_features": ".2%",
    "ce_recovered": ".4f",
    "kl": ".4f",
    "top1_agreement": ".1%",
    "cosine_similarity": ".4f",
    "l2_ratio": ".4f",
    "relative_reconstruction_bias": ".4f",
    "ce_original": ".4f",
    "ce_replaced": ".4f",
    "ce_ablated": ".4f",
    "kl_ablated": ".4f",
    "features": ",d",
    "share": ".1%",
}
MEANINGS = {
    "explained_variance": "share of the variance that is reconstructed; 1 is perfect, 0 is the mean",
    "fvu": "fraction of variance unexplained",
    "l0": "active features a token, all groups",
    "dead_features": "features never active in the tokens evaluated",
    "ce_recovered": "share of the ablated loss that the dictionary gives back; all written sites at once",
    "kl": "nats a token, original from replaced predictions",
    "top1_agreement": "tokens whose most likely next token is unchanged",
}

SHOWN = 5
"""Ablated features in the table; all are in eval.json."""


def show(name: str, value: float | None) -> str:
    """A metric's value as text; "n/a" where it has none."""
    return "n/a" if value is None else format(value, FORMATS[name])


def table(evaluation: dict[str, Any]) -> str:
    """Headline numbers with their meaning, then a line a written site. No trailing newline."""
    lines = [f"{name:<19}{show(name, evaluation[name]):>9}  {meaning}" for name, meaning in MEANINGS.items()]
    replacement = evaluation["replacement"]
    wide = max(len(site) for site in (*evaluation["sites"], "all at once")) + 2
    lines += ["", f"{'':<{wide}}{'explained':>11}{'cosine':>9}{'recovered':>11}{'kl':>9}{'top-1':>8}"]
    for site, found in evaluation["sites"].items():
        scores = replacement["sites"][site] if replacement else {}
        lines.append(_row(site, wide, found, scores))
    if replacement:
        lines.append(_row("all at once", wide, evaluation, replacement["all"]))
    if evaluation["ablated_features"]:
        lines += ["", *_ablated(evaluation["ablated_features"])]
    lines += ["", *_model_diff(evaluation), _caption(evaluation)]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, wide: int, found: dict[str, Any], scores: dict[str, Any]) -> str:
    columns = (("explained_variance", 11, found), ("cosine_similarity", 9, found), ("ce_recovered", 11, scores),
               ("kl", 9, scores), ("top1_agreement", 8, scores))  # fmt: skip
    return f"{name:<{wide}}" + "".join(f"{show(key, row.get(key)):>{width}}" for key, width, row in columns)


def _ablated(features: list[dict[str, Any]]) -> list[str]:
    """The few features that the predictions miss most."""
    lines = [f"{len(features)} features zeroed one at a time in the replacement model; nats a token, greatest first:"]
    for one in features[:SHOWN]:
        lines.append(f"group {one['group']} feature {one['feature']:<9}{one['delta_ce']:>+11.6f}  kl {one['kl']:.6f}")
    return lines


def _model_diff(evaluation: dict[str, Any]) -> list[str]:
    """Features by which of two models holds them; nothing of one model's dictionary."""
    if not (diff := evaluation.get("model_diff")):
        return []
    classes, scaling, cosine = diff["classes"], diff["latent_scaling"], diff["cosine_of_shared"]["median"]
    genuine = f" ({scaling['genuine']:,} by latent scaling too)" if scaling else ""
    middle = "" if cosine is None else f" (median cosine {cosine:.3f})"
    return [
        f"{diff['alive']:,} of {diff['features']:,} features active: {classes['shared']:,} shared{middle}, "
        f"{classes['model_only']:,} of the model only{genuine}, {classes['base_only']:,} of its base only, "
        f"{classes['between']:,} between"
    ]


def _caption(evaluation: dict[str, Any]) -> str:
    text = f"{evaluation['tokens']:,} held-out tokens"
    if replacement := evaluation["replacement"]:
        text += (
            f"; {replacement['tokens']:,} predictions scored in {replacement['windows']:,} windows, "
            f"cross-entropy {replacement['ce_original']:.4f} → {replacement['all']['ce_replaced']:.4f} "
            f"(ablated {replacement['all']['ce_ablated']:.4f})"
        )
    return text
