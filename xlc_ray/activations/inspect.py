"""What a store holds, for people to judge: norms of every site, outliers among its rows, the text behind a row.

Norms are of a sample: slices of rows drawn from all chunks, of which a block of one site is held at a time.
An outlier is a row whose norm at some site is `OUTLIER` times the median there or more: a few of them can own a loss.
Two stores are compared by their statistics: a site's shift is the root mean square over channels of
(μ − μ') / √((σ² + σ'²) / 2), in deviations; about √(1/n + 1/n') comes from drawing n and n' independent rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xlc_ray.activations.manifest import SiteStatistics
from xlc_ray.activations.order import Order
from xlc_ray.activations.store import Store, decode
from xlc_ray.config import UserError

OUTLIER = 10.0
"""Times the median norm."""
_SLICE = 64  # rows drawn together
_BLOCK = 4096  # rows of a site in memory


@dataclass(frozen=True)
class Sample:
    """Rows drawn over a whole store, by chunk [n] and row [n], and the norm of each at each site: {site: [n]}."""

    chunk: np.ndarray
    row: np.ndarray
    norms: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.row)

    def excess(self) -> tuple[np.ndarray, list[str]]:
        """Of each row the most that its norm is over the median norm of a site, [n], and which site that is."""
        sites = list(self.norms)
        # A site whose median is 0, as where most tokens leave a module silent, has no usual norm to compare with.
        ratios = np.stack([values / (float(np.median(values)) or math.inf) for values in self.norms.values()])
        where = ratios.argmax(axis=0)
        return ratios.max(axis=0), [sites[i] for i in where]


def sample(store: Store, rows: int, seed: int) -> Sample:
    """The norms of `rows` rows (all, where there are fewer), the same for the same seed."""
    order = Order(store.chunk_rows, seed, _SLICE, -(-rows // _SLICE))
    drawn = [order.window(0)]
    while sum(map(len, drawn)) < min(rows, order.epoch_rows):  # the last slice of a chunk is shorter than others
        drawn.append(order.window(len(drawn)))
    chunk = np.concatenate([window.chunk for window in drawn])[:rows]
    row = np.concatenate([window.row for window in drawn])[:rows]
    norms = {site: np.empty(len(row)) for site in store.manifest.sites}
    for site, values in norms.items():
        for start in range(0, len(row), _BLOCK):
            here = slice(start, start + _BLOCK)
            found = decode(store.gather(chunk[here], row[here], [site])[site], store.dtype)
            values[here] = found.double().norm(dim=1).numpy()
    return Sample(chunk, row, norms)


def pictures(norms: Mapping[str, np.ndarray], columns: int) -> tuple[dict[str, str], tuple[float, float]]:
    """A line of text a site on one logarithmic axis, and the norms at its ends.

    `─` from the least to the largest norm, `━` from the 1st to the 99th percentile, `●` the median.
    """
    positive = [values[values > 0] for values in norms.values()]
    ends = [float(v) for values in positive if len(values) for v in (values.min(), values.max())]
    low, high = (min(ends), max(ends)) if ends else (1.0, 1.0)
    span = math.log(high / low) or 1.0

    def column(value: float) -> int:
        return round(math.log(max(value, low) / low) / span * (columns - 1))

    drawn = {}
    for site, values in norms.items():
        least, few, middle, many, most = (column(v) for v in np.quantile(values, [0, 0.01, 0.5, 0.99, 1]))
        line = [" "] * columns
        line[least : most + 1] = "─" * (most + 1 - least)
        line[few : many + 1] = "━" * (many + 1 - few)
        line[middle] = "●"
        drawn[site] = "".join(line)
    return drawn, (low, high)


@dataclass(frozen=True)
class Traced:
    """A row's token, and those that stand before and behind it in its window."""

    window: int
    position: int
    before: list[int]
    token: int
    after: list[int]


def trace(store: Store, chunk: int, row: int, before: int, after: int) -> Traced | None:
    """The text of a row, at most so many tokens of it; None in a store without text."""
    text = store.windows(chunk)
    if text is None:
        return None
    window, position = int(text.row_window[row]), int(text.row_position[row])
    ids = text.windows.tokens[window, : text.windows.length[window]].tolist()
    return Traced(
        window, position, ids[max(0, position - before) : position], ids[position], ids[position + 1 :][:after]
    )


@dataclass(frozen=True)
class Difference:
    """Of one site's statistics in two stores."""

    shift: float
    """Root mean square over channels of the difference of means, in deviations."""
    least_spread: float
    median_spread: float
    most_spread: float
    """The second's deviation over the first's: the least, median and largest channel's."""
    norm: float | None
    """The second's mean norm over the first's; None where one does not say."""
    constant: int
    """Channels that do not vary in one or both: they are left out."""


def differences(first: Mapping[str, SiteStatistics], second: Mapping[str, SiteStatistics]) -> dict[str, Difference]:
    """How the second store's statistics differ, at each site of both. Raises UserError: no such site, other widths."""
    common = [site for site in first if site in second]
    if not common:
        raise UserError(f"--against: no site of both; {', '.join(first)} here, {', '.join(second)} there")
    found = {}
    for site in common:
        a, b = first[site], second[site]
        if len(a.mean) != len(b.mean):
            raise UserError(f"--against: {site} is {len(a.mean)} wide here and {len(b.mean)} there")
        varies = (a.std > 0) & (b.std > 0)
        shift = (a.mean - b.mean)[varies] / np.sqrt((a.std[varies] ** 2 + b.std[varies] ** 2) / 2)
        spread = b.std[varies] / a.std[varies] if varies.any() else np.ones(1)
        norm = None if a.mean_norm is None or b.mean_norm is None else b.mean_norm / (a.mean_norm or math.nan)
        found[site] = Difference(
            float(np.sqrt((shift**2).mean())) if varies.any() else 0.0,
            float(spread.min()),
            float(np.median(spread)),
            float(spread.max()),
            norm,
            int((~varies).sum()),
        )
    return found
