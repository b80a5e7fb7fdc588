"""The frontier as a page: one dot a trial with its settings on hover, the frontier's line, a table. Self-contained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from xlc_ray import files
from xlc_ray.evaluation.page import PAGE, STYLE
from xlc_ray.sweeps.frontier import log

Row = dict[str, Any]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900.0, 420.0, 70.0, 50.0, 16.0
SWEEP_STYLE = """
.dot { fill: var(--muted); fill-opacity: .45; }
.dot.stopped { fill: none; stroke: var(--muted); }
.dot.best { fill: var(--accent); fill-opacity: 1; stroke: none; }
.front { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.axis { stroke: var(--line); }
svg text { fill: var(--muted); font: 12px var(--sans); }
td.name, th.name { text-align: left; }
tr.best th { color: var(--accent); font-weight: 600; }
"""


def frontier(out: str, summary: dict[str, Any], rows: Sequence[Row], best: set[str], x: str, y: str) -> str:
    """The page of a sweep's trials in the plane of two metrics; `best`: the names of those on the frontier."""
    shown = [row for row in rows if row["metrics"].get(x) is not None and row["metrics"].get(y) is not None]
    share = summary["share_of_full_steps"]
    facts = (
        f"{summary['trials']} trials: {summary['finished']} finished, {summary['stopped']} stopped early, "
        f"{summary['failed']} failed; {share:.0%} of the steps that all would take; {len(best)} on the frontier."
    )
    body = [
        '<p class="kicker">Sweep</p>',
        f"<h1>{escape(files.name(out))}</h1>",
        f"<p>{escape(facts)}</p>",
        f"<figure>{_plot(shown, best, x, y)}<figcaption>{escape(y)} against {escape(x)} on held-out tokens, both "
        "logarithmic. Filled: trials on the frontier; rings: stopped early. Settings appear on hover.</figcaption>"
        "</figure>",
        _table(rows, best),
    ]
    title = escape(f"{files.name(out)}: frontier")
    return PAGE.format(title=title, style=STYLE + SWEEP_STYLE, body="\n".join(body))


def _plot(rows: Sequence[Row], best: set[str], x: str, y: str) -> str:
    if not rows:
        return "<p>Nothing was measured yet.</p>"
    points = [(log(row["metrics"][x]), log(row["metrics"][y])) for row in rows]
    across, up = _scale([p for p, _ in points], LEFT, WIDTH - 20), _scale([p for _, p in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(y)} against {escape(x)}">']
    parts += _ticks([p for p, _ in points], across, True) + _ticks([p for _, p in points], up, False)
    parts.append(f'<text x="{WIDTH / 2:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="14" y="{HEIGHT / 2:g}" transform="rotate(-90 14 {HEIGHT / 2:g})">{escape(y)}</text>')
    line = sorted((across(a), up(b)) for (a, b), row in zip(points, rows, strict=True) if row["trial"] in best)
    parts.append(f'<polyline class="front" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in line)}"/>')
    for (a, b), row in zip(points, rows, strict=True):
        kind = "best" if row["trial"] in best else row["state"]
        parts.append(
            f'<circle class="dot {escape(kind)}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="5.5">'
            f"<title>{escape(_words(row))}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def _scale(values: Sequence[float], start: float, end: float):
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1
    return lambda value: start + (end - start) * (value - low + room) / (high - low + 2 * room)


def _ticks(values: Sequence[float], place, across: bool) -> list[str]:
    low, high = min(values), max(values)
    steps = 5 if high - low > 1e-6 else 1
    parts = []
    for i in range(steps):
        value = low + (high - low) * i / max(1, steps - 1)
        at, text = place(value), f"{math.exp(value):.3g}"
        if across:
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"/>')
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18:g}" text-anchor="middle">{text}</text>')
        else:
            parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - 20:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8:g}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    return parts


def _words(row: Row) -> str:
    lines = [f"{row['trial']} ({row['state']} at step {row['step']:,})"]
    lines += [f"{path} = {value}" for path, value in row["settings"].items()]
    return "\n".join([*lines, *(f"{name} = {value:.4g}" for name, value in row["metrics"].items())])


def _table(rows: Sequence[Row], best: set[str]) -> str:
    names = ("l0", "fvu", "dead_features")
    head = "".join(f"<th>{name}</th>" for name in ("state", "steps", *names))
    lines = []
    for row in rows:
        cells = [row["state"], f"{row['step']:,} / {row['steps']:,}"]
        cells += [f"{row['metrics'][n]:.4g}" if n in row["metrics"] else "" for n in names]
        mark = ' class="best"' if row["trial"] in best else ""
        lines.append(f"<tr{mark}><th>{escape(row['trial'])}</th>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>")
    return (
        f'<figure class="table"><table><thead><tr><th>trial</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></figure>"
    )
