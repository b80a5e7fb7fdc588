"""Figures of the report: matplotlib drawings as inline SVG, whose colours and font are the page's (CSS variables)."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

# Drawn in these colours, then renamed to the page's variables, so that one drawing suits a light and a dark page.
INK, MUTED, GRID, ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
}
_MOST_LABELLED_BARS = 12
_ERRORS = ("loss", "reconstruction")
"""What falls by orders of magnitude is drawn on a logarithmic axis."""


def curves(lines: Sequence[dict[str, Any]], panels: Sequence[tuple[str, str]], columns: int, label: str) -> str:
    """Small multiples over training tokens. `panels`: (key of `lines`, title). Empty where no key is there."""
    panels = [(key, title) for key, title in panels if any(_number(line.get(key)) for line in lines)]
    if not panels:
        return ""
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.35 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (key, title) in zip(grid, panels, strict=False):
            points = [(line["tokens"], line[key]) for line in lines if _number(line.get(key))]
            _curve(axes, points, title, key)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return _svg(figure, label)


def bars(panels: Sequence[tuple[str, Sequence[str], Sequence[float | None], str]], label: str) -> str:
    """Bar charts side by side; a panel is (title, names, values, number format)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        for axes, (title, names, values, form) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            heights = [0.0 if value is None else value for value in values]
            drawn = axes.bar(range(len(names)), heights, width=0.62, color=ACCENT)
            if len(names) <= _MOST_LABELLED_BARS:
                texts = ["n/a" if value is None else format(value, form) for value in values]
                axes.bar_label(drawn, texts, padding=2, fontsize=8.5, color=INK)
            shown = range(0, len(names), math.ceil(len(names) / _MOST_LABELLED_BARS))
            slanted = max(map(len, names)) * min(len(names), _MOST_LABELLED_BARS) > 60
            axes.set_xticks(
                shown, [names[i] for i in shown], rotation=35 if slanted else 0, ha="right" if slanted else "center"
            )
            axes.set_title(title)
            axes.margins(y=0.14)
            axes.axhline(0, color=MUTED, linewidth=0.7)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            _from_zero(axes, heights, title, room=1.12)
        return _svg(figure, label)


def histogram(edges: Sequence[float], counts: Sequence[int], tokens: int, label: str) -> str:
    """Features by log10 frequency, from one activation in all tokens to every token; the dead bin is not drawn."""
    first = math.floor(math.log10(1 / max(tokens, 1)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.5), layout="constrained")
        axes = figure.subplots()
        alive = [(left, right, n) for left, right, n in zip(edges, edges[1:], counts, strict=False) if right > first]
        if first > edges[0]:  # the lowest bin that is drawn can then hold no dead feature
            axes.bar([a for a, _, _ in alive], [n for *_, n in alive], width=[(b - a) * 0.92 for a, b, _ in alive],
                     align="edge", color=ACCENT)  # fmt: skip
        axes.set_xlim(first, 0)
        ticks = range(first, 1)
        axes.set_xticks(ticks, [_decade(tick) for tick in ticks])
        axes.set_xlabel("share of tokens on which a feature is active")
        axes.set_title("Features")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return _svg(figure, label)


Distribution = tuple[str, str, Sequence[float], Sequence[int], Sequence[float]]
"""A histogram: title, name of the axis, edges, counts, where thresholds are drawn."""


def distributions(panels: Sequence[Distribution], label: str) -> str:
    """Histograms side by side."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        for axes, (title, name, edges, counts, marks) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            widths = [(right - left) * 0.92 for left, right in itertools.pairwise(edges)]
            axes.bar(edges[:-1], counts, width=widths, align="edge", color=ACCENT)
            for mark in marks:
                axes.axvline(mark, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
            axes.set_xlim(edges[0], edges[-1])
            axes.set_xlabel(name)
            axes.set_title(title)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        return _svg(figure, label)


def _curve(axes: Axes, points: Sequence[tuple[float, float]], title: str, key: str) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=ACCENT, marker="o" if len(points) == 1 else None, markersize=4)
    axes.set_title(title)
    if key in _ERRORS and min(ys) > 0 and max(ys) > 10 * min(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _from_zero(axes, ys, title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.01)


def _from_zero(axes: Axes, values: Sequence[float], title: str, room: float = 1.0) -> None:
    """Start the axis at 0 where nothing is below, and end it at 1 (times `room`) for what cannot exceed 1."""
    if min(values) >= 0:
        axes.set_ylim(bottom=0)
        if title.startswith("Explained variance") or max(values) == 0:
            axes.set_ylim(top=room)


def _decade(exponent: int) -> str:
    """A share of 10^exponent in per cent."""
    return f"{100 * 10.0**exponent:.10g} %" if exponent >= -4 else f"1e{exponent + 2} %"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    # A fixed salt: the same numbers give the same file. It differs between figures, whose ids share one page.
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would reach the whole page
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
