"""report.html: one self-contained page about a run. No script, no network, no font of its own; light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from xlc_ray import files
from xlc_ray.config import Config
from xlc_ray.evaluation import figures
from xlc_ray.evaluation.model_diff import SHARED
from xlc_ray.evaluation.page import PAGE, STYLE
from xlc_ray.evaluation.table import MEANINGS, show

NAMES = {
    "explained_variance": "Explained variance",
    "fvu": "FVU",
    "l0": "L0",
    "dead_features": "Dead features",
    "ce_recovered": "CE recovered",
    "kl": "KL",
    "top1_agreement": "Top-1 agreement",
    "cosine_similarity": "Cosine",
    "l2_ratio": "L2 ratio",
    "relative_reconstruction_bias": "Bias",
    "ce_replaced": "CE replaced",
    "ce_ablated": "CE ablated",
    "kl_ablated": "KL ablated",
    "ce_original": "CE",
    "features": "Features",
    "share": "Share",
}
WIRINGS = {
    "sae": "Sparse autoencoders",
    "transcoder": "Transcoders",
    "clt": "Cross-layer transcoder",
    "crosscoder": "Crosscoder",
    "model_diff": "Model-diff crosscoder",
    "custom": "Custom dictionary",
}
MAIN_CURVES = (
    ("loss", "Loss"),
    ("explained_variance", "Explained variance"),
    ("l0", "L0, features a token"),
    ("dead_features", "Dead features, share"),
)
NO_CURVES = {"step", "tokens", "time", "epoch"}


def write_report(
    run_dir: str, config: Config, metrics_lines: Sequence[dict[str, Any]], evaluation: dict[str, Any]
) -> str:
    """Write report.html into a run directory (or URL) and return its path.

    `metrics_lines`: the lines of metrics.jsonl in the order they were written; where a resumed run wrote a step twice
    the later line counts. `evaluation`: what `evaluate` returned.
    """
    lines = [line for _, line in sorted({line["step"]: line for line in metrics_lines}.items())]
    title = f"{WIRINGS[config.dictionary.wiring.kind]} of {_short(config.model.name)}"
    if config.base_model:
        title += f" and {_short(config.base_model.name)}"
    parts = [
        _header(title, config, lines, evaluation),
        _headline(evaluation),
        _training(lines, config),
        _reconstruction(evaluation),
        _density(evaluation),
        _replacement(evaluation),
        _model_diff(evaluation, config),
        f"<details><summary>Settings</summary><pre>{escape(config.yaml())}</pre></details>",
    ]
    path = files.join(run_dir, "report.html")
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, parts)))
    files.write_bytes(path, page.encode())
    return path


def _header(title: str, config: Config, lines: Sequence[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    dictionary, gate = config.dictionary, config.dictionary.gate
    k = f", k = {gate.k}" if hasattr(gate, "k") else ""
    groups = evaluation["groups"]
    trained = lines[-1]["tokens"] if lines else 0
    facts = (
        ("Features", f"{len(groups)} groups of {groups[0]['features']:,}"),
        ("Gate", f"{gate.kind}{k}"),
        ("Normalisation", dictionary.normalization.kind),
        ("Trained on", f"{trained:,} tokens" if lines else "n/a"),
        ("Text", " + ".join(_short(str(part.dataset)) for part in config.text.parts())),
        ("Evaluated on", f"{evaluation['tokens']:,} held-out tokens"),
    )
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<header><p class="kicker">xlc_ray</p><h1>{escape(title)}</h1><dl class="facts">{cells}</dl></header>'


def _headline(evaluation: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{NAMES[name]}</th><td class="big">{_value(name, evaluation[name])}</td>'
        f'<td class="text">{escape(meaning)}</td></tr>'
        for name, meaning in MEANINGS.items()
    )
    return f'<section class="headline"><table><tbody>{rows}</tbody></table></section>'


def _training(lines: Sequence[dict[str, Any]], config: Config) -> str:
    main = figures.curves(lines, MAIN_CURVES, 2, "Loss, explained variance, L0 and dead features over training")
    if not main:
        return ""
    keys = {key: None for line in lines for key in line if key not in NO_CURVES | dict(MAIN_CURVES).keys()}
    more = figures.curves(lines, [(key, escape(key)) for key in keys], 3, "Other quantities over training")
    scale = "summed over" if config.train.loss.scale == "canonical" else "averaged over"
    caption = (
        f"Over tokens trained on. The loss is squared error {scale} each site's width, summed over sites, averaged "
        "over tokens, plus penalties. During training a feature is dead after "
        f"{config.train.dead_after_tokens:,} silent tokens."
    )
    extra = f"<details><summary>Other curves</summary><figure>{more}</figure></details>" if more else ""
    return _section("Training", _figure(main, caption) + extra)


def _reconstruction(evaluation: dict[str, Any]) -> str:
    sites, groups = evaluation["sites"], evaluation["groups"]
    variance = [found["explained_variance"] for found in sites.values()]
    names = [group["reads"][0] if len(group["reads"]) == 1 else f"group {g}" for g, group in enumerate(groups)]
    panels = [
        ("Explained variance by written site", list(sites), variance, ".3f"),
        ("L0 by group (the site it reads)", names, [group["l0"] for group in groups], ".1f"),
    ]
    drawing = figures.bars(panels, "Explained variance by site and L0 by group")
    columns = ("explained_variance", "fvu", "cosine_similarity", "l2_ratio", "relative_reconstruction_bias")
    rows = [(site, [found[name] for name in columns]) for site, found in sites.items()]
    rows.append(("all sites", [evaluation[name] for name in columns]))
    caption = (
        "Held-out tokens. Sites in the model's own units; explained variance and FVU of all sites are one ratio of "
        "sums in normalised units, where each site is scaled; the other columns are then means over sites. "
        "Explained variance = 1&nbsp;&minus;&nbsp;E‖x&nbsp;&minus;&nbsp;x̂‖² / (E‖x‖² &minus; ‖E x‖²). "
        "Cosine = E[x·x̂ / ‖x‖‖x̂‖]. L2 ratio = E[‖x̂‖ / ‖x‖]. Bias = E‖x̂‖² / E[x·x̂]."
    )
    dead = [(name, [group["l0"], group["dead_features"]]) for name, group in zip(names, groups, strict=True)]
    dead.append(("all groups", [evaluation["l0"], evaluation["dead_features"]]))
    silent = f"L0: mean active features a token. Dead: never active in {evaluation['tokens']:,} held-out tokens."
    activity = _table("Group", ("l0", "dead_features"), dead, silent, "table narrow")
    return _section(
        "Reconstruction", f"<figure>{drawing}</figure>" + _table("Written site", columns, rows, caption) + activity
    )


def _density(evaluation: dict[str, Any]) -> str:
    density, tokens = evaluation["feature_density"], evaluation["tokens"]
    drawing = figures.histogram(density["log10_edges"], density["total"], tokens, "Features by frequency")
    caption = (
        f"How often features are active, over {tokens:,} held-out tokens; a bin is a quarter of a decade. "
        f"{density['total'][0]:,} of {sum(density['total']):,} features were never active and are not drawn."
    )
    return _section("Feature density", _figure(drawing, caption))


def _replacement(evaluation: dict[str, Any]) -> str:
    replacement = evaluation["replacement"]
    if not replacement:
        return ""
    columns = ("ce_replaced", "ce_ablated", "ce_recovered", "kl", "kl_ablated", "top1_agreement")
    rows = [(site, [scores[name] for name in columns]) for site, scores in replacement["sites"].items()]
    rows.append(("all at once", [replacement["all"][name] for name in columns]))
    inputs = {
        "modified": "All at once: each group reads the modified stream, layer by layer.",
        "clean": "All at once: features are computed from the unmodified model.",
    }[replacement["replacement_inputs"]]
    if "models" in replacement:
        inputs += " Each of the two models is scored against itself; all at once: the predictions of both together."
    caption = (
        f"Cross-entropy (CE) and KL in nats a token; the unmodified model's CE is {replacement['ce_original']:.4f}. "
        f"{inputs} A site alone: features of the unmodified model, only that site substituted. Ablated: set to zero. "
        "CE recovered = (ablated &minus; replaced) / (ablated &minus; original); "
        "where ablation hardly hurts it means little. "
        f"{replacement['tokens']:,} predictions made from replaced positions of "
        f"{replacement['windows']:,} held-out windows."
    )
    return _section("Replacement model", _table("Written site", columns, rows, caption))


def _model_diff(evaluation: dict[str, Any], config: Config) -> str:
    diff = evaluation.get("model_diff")
    if not diff or not config.base_model:
        return ""
    norms, cosines, classes = diff["relative_norm"], diff["cosine_of_shared"], diff["classes"]
    axis = "‖d‖ / (‖d‖ + ‖d_base‖): 0 = base only, 1 = model only"
    panels: list[figures.Distribution] = [("Features by relative norm", axis, norms["edges"], norms["counts"], SHARED)]
    if any(cosines["counts"]):
        panels.append(("Shared features", "cosine of d and d_base", cosines["edges"], cosines["counts"], ()))
    drawing = figures.distributions(panels, "Features by relative decoder norm, and cosine of shared features")
    caption = (
        f"d, d_base: a feature's decoder rows for {escape(_short(config.model.name))} and for "
        f"{escape(_short(config.base_model.name))}, each in normalised units. Features active in "
        f"{diff['tokens']:,} held-out tokens. Shared: between the dashed lines."
    )
    rows = [(name.replace("_", " "), [n, n / max(diff["alive"], 1)]) for name, n in classes.items()]
    rows.append(("active", [diff["alive"], 1.0 if diff["alive"] else None]))
    genuine = ""
    if scaling := diff["latent_scaling"]:
        genuine = (
            f" Latent scaling: of {scaling['features']:,} features of the model only, {scaling['genuine']:,} are none "
            "of the base's (nu_error &lt; 0.2 and nu_reconstruction &lt; 0.5; see eval.json)."
        )
    kinds = "Model only and base only: the other model's row is at most a fifth as long." + genuine
    body = _figure(drawing, caption) + _table("Class", ("features", "share"), rows, kinds, "table narrow")
    return _section("Model diff", body + _both_models(evaluation))


def _both_models(evaluation: dict[str, Any]) -> str:
    """Each model with its site replaced."""
    if not (replacement := evaluation["replacement"]):
        return ""
    columns = ("explained_variance", "ce_original", "ce_replaced", "ce_ablated", "ce_recovered", "kl", "top1_agreement")
    explained = {site: found["explained_variance"] for site, found in evaluation["sites"].items()}
    named = zip(("model", "base_model"), evaluation["model_diff"]["sites"], strict=True)
    rows = [(site, {"explained_variance": explained[site], **replacement["models"][name]}) for name, site in named]
    rows.append(("both", {"explained_variance": evaluation["explained_variance"], **replacement["all"]}))
    table = [(name, [values[column] for column in columns]) for name, values in rows]
    return _table("Replaced", columns, table, "CE: of the unmodified model, on the tokens that it reads.")


def _table(
    head: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    caption: str,
    style: str = "table",
) -> str:
    """A table of metrics whose last row is the total."""
    titles = "".join(f'<th scope="col">{NAMES[name]}</th>' for name in columns)
    body = ""
    for name, values in rows:
        cells = "".join(f"<td>{_value(key, value)}</td>" for key, value in zip(columns, values, strict=True))
        total = ' class="total"' if name == rows[-1][0] else ""
        body += f'<tr{total}><th scope="row">{escape(name)}</th>{cells}</tr>'
    return (
        f'<figure class="{style}"><table><thead><tr><th scope="col">{head}</th>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table><figcaption>{caption}</figcaption></figure>"
    )


def _value(name: str, value: float | None) -> str:
    return show(name, value).replace("-", "&minus;").replace("%", "\N{THIN SPACE}%")


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _short(name: str) -> str:
    """The last part of a path; a Hub name stays whole."""
    return name if name.count("/") == 1 and not name.startswith((".", "/")) else name.rstrip("/").rsplit("/", 1)[-1]
