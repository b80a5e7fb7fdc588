"""Drawings of a sweep's page, as SVG: the frontier, parallel coordinates, learning curves.

Whatever belongs to a trial carries its number in `data-t`: the page's script lights it up in all drawings at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from xlc_ray.sweeps.frontier import log, log_if_positive

Row = dict[str, Any]
Scale = Callable[[float], float]
Tick = tuple[float, float]
"""Where it stands on a scale, and its value."""
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 900.0, 420.0, 70.0, 20.0, 50.0, 16.0
MOST_TICKS = 8
"""Values of a setting that are named on its axis; of more, the ends."""
NOTHING = "\N{EN DASH}"


def frontier(rows: Sequence[Row], best: set[str], x: str, y: str) -> str:
    """A dot a trial in the plane of two metrics, each logarithmic if all its values are above 0, and the line of the
    frontier."""
    shown = [(i, row) for i, row in enumerate(rows) if has(row, x, y)]
    xs, ys = [row["metrics"][x] for _, row in shown], [row["metrics"][y] for _, row in shown]
    sideways, upwards = log_if_positive(xs), log_if_positive(ys)
    points = [(sideways(a), upwards(b)) for a, b in zip(xs, ys, strict=True)]
    across = _scale([p for p, _ in points], LEFT, WIDTH - RIGHT)
    up = _scale([p for _, p in points], HEIGHT - BOTTOM, TOP)
    parts = _frame(_ticks(xs), _ticks(ys), across, up, x, y)
    line = sorted((across(a), up(b)) for (a, b), (_, row) in zip(points, shown, strict=True) if row["trial"] in best)
    parts.append(f'<polyline class="front" points="{_points(line)}"/>')
    for (a, b), (i, row) in zip(points, shown, strict=True):
        parts.append(
            f'<circle class="dot {_kind(row, best)}" data-t="{i}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="5.5">'
            f"<title>{escape(words(row))}</title></circle>"
        )
    return _svg(parts, f"{y} against {x}", HEIGHT)


def parallel(rows: Sequence[Row], best: set[str], metrics: Sequence[str]) -> str:
    """A line a trial through the settings that differ, and what it measured."""
    shown = [(i, row) for i, row in enumerate(rows) if has(row, *metrics)]
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    settings = {name: [row["settings"].get(name) for _, row in shown] for name in names}
    axes = {name: values for name, values in settings.items() if len({str(v) for v in values if v is not None}) > 1}
    axes |= {name: [row["metrics"][name] for _, row in shown] for name in metrics}
    top, bottom = 56.0, 330.0
    places = [90 + (WIDTH - 180) * n / max(1, len(axes) - 1) for n in range(len(axes))]
    scales = [_axis(values, bottom, top) for values in axes.values()]
    parts = [f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{top:g}" y2="{bottom:g}"/>' for at in places]
    for n, (i, row) in sorted(enumerate(shown), key=lambda each: each[1][1]["trial"] in best):
        line = [(at, scale(values[n])) for at, values, scale in zip(places, axes.values(), scales, strict=True)]
        parts.append(
            f'<polyline class="run {_kind(row, best)}" data-t="{i}" points="{_points(line)}">'
            f"<title>{escape(words(row))}</title></polyline>"
        )
    for n, (at, (name, values), scale) in enumerate(zip(places, axes.items(), scales, strict=True)):
        *_, above, last = ["", *name.split(".")]
        height = 18 + 16 * (n % 2) * (len(axes) > 6)  # names of many axes stand in two rows
        parts.append(f'<text x="{at:.1f}" y="{height}" text-anchor="middle">{escape(above if last == "kind" else last)}'
                     f"<title>{escape(name)}</title></text>")  # fmt: skip
        side, by = ("start", at + 8) if at == places[-1] else ("end", at - 8)
        for value in _ticks_of(values):
            where = f'x="{by:.1f}" y="{scale(value) + 4:.1f}" text-anchor="{side}"'
            parts.append(f"<text {where}>{escape(_named(value))}</text>")
    return _svg(parts, "settings and measurements of each trial", 346.0)


def curves(
    rows: Sequence[Row], lines: Sequence[Sequence[tuple[int, float]]], best: set[str], rungs: Sequence[int], y: str
) -> str:
    """A curve (step, value) a trial, the value logarithmic; rungs are dashed, and what was cut ends in a ring."""
    known = [(step, log(value)) for line in lines for step, value in line]
    across = _scale([0.0, *(step for step, _ in known)], LEFT, WIDTH - RIGHT, room=0.02)
    up = _scale([value for _, value in known], HEIGHT - BOTTOM, TOP)
    steps = _round(0, max(step for step, _ in known), least=0)
    parts = _frame([], _ticks([value for line in lines for _, value in line]), across, up, "steps", y)
    parts += [
        f'<text x="{across(s):.1f}" y="{HEIGHT - BOTTOM + 18:g}" text-anchor="middle">{s:,.0f}</text>' for s in steps
    ]
    for rung in rungs:
        at = across(rung)
        parts.append(f'<line class="rung" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}">'
                     f"<title>rung: {rung:,} steps</title></line>")  # fmt: skip
    for i, (row, line) in sorted(
        enumerate(zip(rows, lines, strict=True)), key=lambda each: each[1][0]["trial"] in best
    ):
        if not line:
            continue
        path = [(across(step), up(log(value))) for step, value in line]
        title = f"<title>{escape(words(row))}</title>"
        kind = _kind(row, best)
        parts.append(f'<polyline class="run {kind}" data-t="{i}" points="{_points(path)}">{title}</polyline>')
        (a, b), cut = path[-1], row["state"] == "stopped"
        parts.append(f'<circle class="dot {kind}{" cut" * cut}" data-t="{i}" cx="{a:.1f}" cy="{b:.1f}" r="{4 + cut}">'
                     f"{title}</circle>")  # fmt: skip
    return _svg(parts, f"{y} by steps", HEIGHT)


def words(row: Row) -> str:
    """A trial, for those who point at it."""
    lines = [f"{row['trial']} ({row['state']} at step {row['step']:,})"]
    lines += [f"{path} = {value}" for path, value in row["settings"].items()]
    lines += past(row)
    return "\n".join([*lines, *(f"{n} = {value:.4g}" for n, value in row["metrics"].items() if value is not None)])


def past(row: Row) -> list[str]:
    """Each time that a trial of a population was replaced, newest last."""
    told = row.get("history") or []
    return [
        f"at step {now['step']:,} from {now['from']}, before: "
        + ", ".join(f"{path} = {value}" for path, value in before["settings"].items())
        for before, now in itertools.pairwise(told)
    ]


def has(row: Row, *names: str) -> bool:
    """Whether a trial has measured these."""
    return all(row["metrics"].get(name) is not None and math.isfinite(row["metrics"][name]) for name in names)


def _kind(row: Row, best: set[str]) -> str:
    return "best" if row["trial"] in best else escape(row["state"])


def _points(line: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in line)


def _svg(parts: Sequence[str], label: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _scale(values: Sequence[float], start: float, end: float, room: float = 0.06) -> Scale:
    low, high = min(values), max(values)
    spare = room * (high - low) or 0.1
    return lambda value: start + (end - start) * (value - low + spare) / (high - low + 2 * spare)


def _frame(xs: Sequence[Tick], ys: Sequence[Tick], across: Scale, up: Scale, x: str, y: str) -> list[str]:
    """Names and ticks of both axes."""
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{(LEFT + right) / 2:g}" y="{HEIGHT - 8:g}" text-anchor="middle">{escape(x)}</text>']
    middle = (TOP + low) / 2
    parts.append(
        f'<text x="14" y="{middle:g}" text-anchor="middle" transform="rotate(-90 14 {middle:g})">{escape(y)}</text>'
    )
    for place, value in xs:
        at = across(place)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP:g}" y2="{low:g}"/>')
        parts.append(f'<text x="{at:.1f}" y="{low + 18:g}" text-anchor="middle">{value:.3g}</text>')
    for place, value in ys:
        at = up(place)
        parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8:g}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    return parts


def _ticks(values: Sequence[float]) -> list[Tick]:
    """Round numbers on the scale of these values."""
    if log_if_positive(values) is math.log:
        return [(at, math.exp(at)) for at in _decades([math.log(value) for value in values])]
    return [(at, at) for at in _round(min(values), max(values))]


def _decades(values: Sequence[float]) -> list[float]:
    """Logarithms of round numbers in a range of logarithms, or its ends."""
    low, high = min(values), max(values)
    for digits in ((1.0, 10.0), (1, 2, 5, 10), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10)):
        powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        found = sorted({math.log(digit * 10.0**power) for power in powers for digit in digits})
        if len(inside := [at for at in found if low - 1e-9 <= at <= high + 1e-9]) >= 3:
            return inside
    return [low, high] if high - low > 1e-6 else [low]


def _round(low: float, high: float, least: int = -9) -> list[float]:
    """Multiples of 1, 2 or 5 of a power of ten, 10^least or more, in a range: at most seven."""
    gap = next(g * 10.0**power for power in range(least, 19) for g in (1, 2, 5) if high - low <= 6 * g * 10.0**power)
    return [gap * n for n in range(math.ceil(low / gap), math.floor(high / gap) + 1)] or [low, high]


def _numbers(values: Sequence[Any]) -> bool:
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in values)


def _axis(values: Sequence[Any], bottom: float, top: float) -> Callable[[Any], float]:
    """Where a value stands: numbers by size (by their logarithm where they span a decade), others in order of
    appearance; what a trial does not have, below."""
    if _numbers(values):
        there = [float(v) for v in values if v is not None]
        seen = log if min(there) > 0 and max(there) >= 10 * min(there) else float
        scale = _scale([seen(v) for v in there], bottom - 24, top, room=0.02)
        return lambda value: bottom if value is None else scale(seen(float(value)))
    order = {name: float(n) for n, name in enumerate(dict.fromkeys(str(v) for v in values if v is not None))}
    scale = _scale(list(order.values()), bottom - 24, top, room=0.02)
    return lambda value: bottom if value is None else scale(order[str(value)])


def _ticks_of(values: Sequence[Any]) -> list[Any]:
    there = list(dict.fromkeys(v if _numbers(values) else str(v) for v in values if v is not None))
    if _numbers(values) and len(there) > MOST_TICKS:
        there = [min(there), max(there)]
    return [*there, *([None] if None in values else [])]


def _named(value: Any) -> str:
    return NOTHING if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
