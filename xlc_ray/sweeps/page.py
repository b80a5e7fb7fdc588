"""report.html of a sweep: frontier, parallel coordinates, learning curves, table. One file without network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from xlc_ray import files
from xlc_ray.evaluation.page import COLOURS, PAGE, STYLE
from xlc_ray.sweeps import drawing
from xlc_ray.sweeps.drawing import Row

SWEEP_STYLE = """
.dot { fill: var(--muted); fill-opacity: .45; }
.dot.stopped { fill: var(--page); fill-opacity: 1; stroke: var(--muted); }
.dot.best { fill: var(--accent); fill-opacity: 1; stroke: none; }
.run { fill: none; stroke: var(--muted); stroke-opacity: .35; stroke-width: 1.2; }
.run.best { stroke: var(--accent); stroke-opacity: .9; stroke-width: 1.7; }
.front { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.axis { stroke: var(--line); }
.rung { stroke: var(--muted); stroke-dasharray: 3 4; stroke-width: 1.2; }
svg text { fill: var(--muted); font: 12px var(--sans); paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
[data-t] { cursor: default; }
.run.on { stroke: var(--ink); stroke-opacity: 1; stroke-width: 2.6; }
.dot.on { fill: var(--ink); fill-opacity: 1; stroke: none; }
tr.on { background: var(--line); }
tr.best th { color: var(--accent); font-weight: 600; }
td.error { text-align: left; white-space: normal; }
"""
SCRIPT = """<script>
for (const kind of ["mouseover", "mouseout"]) document.addEventListener(kind, event => {
  const one = event.target.closest("[data-t]");
  if (one) for (const other of document.querySelectorAll(`[data-t="${one.dataset.t}"]`))
    other.classList.toggle("on", kind === "mouseover");
});
</script>"""
SHOWN = ("l0", "fvu", "dead_features")


def report(
    out: str,
    summary: dict[str, Any],
    rows: Sequence[Row],
    lines: Sequence[Sequence[tuple[int, float]]],
    best: set[str],
    x: str,
    y: str,
) -> str:
    """The page. `best`: the names of the trials on the frontier of the metrics x and y; `lines`: of each trial, what is
    left unexplained of training batches, by step."""
    share = summary["share_of_full_steps"]
    moved = f", {summary['replaced']} times replaced" if summary.get("replaced") else ""
    facts = (
        f"{summary['trials']} trials: {summary['finished']} finished, {summary['stopped']} stopped early, "
        f"{summary['failed']} failed{moved}; {share:.0%} of the steps that all would take; {len(best)} on the frontier."
    )
    body = [
        '<p class="kicker">Sweep</p>',
        f"<h1>{escape(files.name(out))}</h1>",
        f"<p>{escape(facts)}</p>",
        *_drawings(summary, rows, lines, best, x, y),
        "<h2>Trials</h2>",
        _table(rows, best, tuple(dict.fromkeys((*SHOWN, x, y)))),
        SCRIPT,
    ]
    title = escape(f"{files.name(out)}: sweep")
    return PAGE.format(title=title, style=STYLE + SWEEP_STYLE, body="\n".join(body))


def picture(rows: Sequence[Row], best: set[str], x: str, y: str) -> str:
    """The frontier alone, as an SVG file."""
    start, _, rest = drawing.frontier(rows, best, x, y).partition(">")
    ground = '<rect width="100%" height="100%" fill="var(--page)"/>'
    style = f"<style>{COLOURS}{SWEEP_STYLE}</style>"
    return f'{start} xmlns="http://www.w3.org/2000/svg">{style}{ground}{rest}\n'


def _drawings(
    summary: dict[str, Any],
    rows: Sequence[Row],
    lines: Sequence[Sequence[tuple[int, float]]],
    best: set[str],
    x: str,
    y: str,
) -> list[str]:
    if not any(drawing.has(row, x, y) for row in rows):
        return ["<p>Nothing was measured yet.</p>"]
    found = [
        _figure(
            drawing.frontier(rows, best, x, y),
            f"{y} against {x} on held-out tokens, logarithmic where all values are above 0. Filled: trials on the "
            "frontier; rings: stopped early. Settings appear on hover, and the trial is marked in all drawings.",
        ),
        "<h2>Settings</h2>",
        _figure(
            drawing.parallel(rows, best, (x, y)),
            f"A line a trial, through the settings that differ, to its {x} and {y}. A dash: it has no such setting.",
        ),
    ]
    if any(lines):
        rungs = summary.get("rungs", ())
        at = (
            f"Dashed: rungs, at which trials are compared ({', '.join(f'{r:,}' for r in rungs)} steps). "
            if rungs
            else ""
        )
        found += [
            "<h2>Learning curves</h2>",
            _figure(
                drawing.curves(rows, lines, best, rungs, "unexplained"),
                f"Share of variance left unexplained in training batches, logarithmic. {at}A ring: cut there.",
            ),
        ]
    return found


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(rows: Sequence[Row], best: set[str], names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("state", "steps", *names))
    lines = []
    for i, row in enumerate(rows):
        cells = [row["state"], f"{row['step']:,} / {row['steps']:,}"]
        cells += [f"{row['metrics'][n]:.4g}" if row["metrics"].get(n) is not None else "" for n in names]
        mark = ' class="best"' if row["trial"] in best else ""
        more = "; ".join([*drawing.past(row), *([row["error"]] if row.get("error") else [])])
        error = f'<td class="error">{escape(more)}</td>' if more else ""
        cells = [f"<td>{escape(cell)}</td>" for cell in cells]
        lines.append(f'<tr data-t="{i}"{mark}><th>{escape(row["trial"])}</th>{"".join(cells)}{error}</tr>')
    return (
        f'<figure class="table"><table><thead><tr><th>trial</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></figure>"
    )
