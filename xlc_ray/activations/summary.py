"""What inspect_path.py finds in a store, as lines for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xlc_ray import files
from xlc_ray.activations.inspect import OUTLIER, Sample, differences, pictures, trace
from xlc_ray.activations.manifest import Manifest
from xlc_ray.activations.store import Store, is_there, open_store
from xlc_ray.progress import size

COLUMNS = 48
"""Of the picture of norms."""
BEFORE, AFTER = 12, 4
"""Tokens of a row's text before and behind its own."""

Words = Callable[[list[int]], str]
"""Token ids → text."""


def described(store: Store) -> Iterator[str]:
    """Rows, sites, bytes; where they came from; the held-out part."""
    manifest = store.manifest
    total, sites, chunks = sum(chunk.bytes for chunk in manifest.chunks), len(manifest.sites), len(manifest.chunks)
    yield f"{store.path}: {manifest.tokens:,} rows of {sites} sites in {chunks} chunks"
    yield f"{manifest.dtype}, {total / manifest.tokens:,.0f} bytes a token, {size(total)}"
    if manifest.lost:
        worst = max(manifest.lost, key=manifest.lost.__getitem__)
        yield f"of the variance, 8 bits lost {manifest.lost[worst]:.2g} at {worst} and less elsewhere"
    yield _origin(manifest)
    held_out = files.join(store.path, "held_out")
    if is_there(held_out):
        yield f"held out: {open_store(held_out).manifest.tokens:,} rows in {held_out}"


def _origin(manifest: Manifest) -> str:
    known = manifest.identity
    text: dict[str, Any] = known.get("text", {})
    names = text.get("dataset") or " + ".join(share["dataset"] for share in text.get("mixture") or [])
    parts = [f"model {manifest.model}"]
    parts += [f"base {known['base_model']['name']}"] if "base_model" in known else []
    parts += [f"text {names} ({text.get('split')})"] if names else []
    parts += [f"windows of {text['context']} tokens"] if "context" in text else []
    parts += [f"seed {known['seed']}"] if "seed" in known else []
    return ", ".join([*parts, f"fingerprint {manifest.fingerprint or 'none: made by another program'}"])


def norms_table(store: Store, sample: Sample) -> Iterator[str]:
    """A line a site: exact statistics of all rows, the sample's norms, and their picture on an axis of all sites."""
    statistics = store.statistics()
    drawn, (low, high) = pictures(sample.norms, COLUMNS)
    wide = max(map(len, drawn)) + 1
    axis = f"{low:.3g}".ljust(COLUMNS - len(f"{high:.3g}")) + f"{high:.3g}"
    yield f"{'':<{wide}}{'width':>6}{'std':>9}{'norm':>9}{'median':>9}{'most/median':>12}  {axis}"
    for site, values in sample.norms.items():
        s, median = statistics[site], float(np.median(values))
        std = float(np.sqrt((s.std**2).mean()))
        norm = "-" if s.mean_norm is None else f"{s.mean_norm:.4g}"
        most = f"{values.max() / median:.1f}" if median else "-"
        yield f"{site:<{wide}}{len(s.mean):>6}{std:>9.4g}{norm:>9}{median:>9.4g}{most:>12}  {drawn[site]}".rstrip()
    yield (
        "std, norm: of all rows, std over channels by root mean square; the rest: "
        f"{len(sample):,} rows, ─ all, ━ 98 %, ● median"
    )


def outliers(store: Store, sample: Sample, shown: int, words: Words) -> Iterator[str]:
    """How many rows of the sample are outliers, and the farthest of them (or the farthest of all) with their text."""
    excess, sites = sample.excess()
    found = int((excess >= OUTLIER).sum())
    yield f"{found:,} of {len(sample):,} rows have {OUTLIER:g} times the median norm at some site; the largest:"
    for i in np.argsort(-excess, kind="stable")[:shown]:
        text = text_of(store, int(sample.chunk[i]), int(sample.row[i]), words)
        yield f"  {excess[i]:>7.1f} x at {sites[i]:<12} {text}"


def rows(store: Store, sample: Sample, shown: int, words: Words) -> Iterator[str]:
    """The first rows of the sample with their text."""
    yield "rows, drawn at random:"
    for chunk, row in zip(sample.chunk[:shown].tolist(), sample.row[:shown].tolist(), strict=True):
        yield f"  {text_of(store, chunk, row, words)}"


def text_of(store: Store, chunk: int, row: int, words: Words) -> str:
    """Where a row stands, and its token within its text."""
    place = f"chunk {store.manifest.chunks[chunk].index} row {row}"
    found = trace(store, chunk, row, BEFORE, AFTER)
    if found is None:
        return f"{place}: a store without text"
    before, token, after = words(found.before), words([found.token]), words(found.after)
    return f"{place} (window {found.window}, position {found.position}): {before}[{token}]{after}"


def compared(first: Store, second: Store) -> Iterator[str]:
    """A line a site of both stores: how far the second's statistics are from the first's."""
    found = differences(first.statistics(), second.statistics())
    wide = max(map(len, found)) + 1
    yield f"{'':<{wide}}{'shift of means':>15}{'norm':>9}{'std: least':>12}{'median':>9}{'most':>9}"
    for site, d in found.items():
        norm = "-" if d.norm is None else f"{d.norm:.4g}"
        spreads = f"{d.least_spread:>12.4g}{d.median_spread:>9.4g}{d.most_spread:>9.4g}"
        left_out = f"  ({d.constant} channels that do not vary left out)" if d.constant else ""
        yield f"{site:<{wide}}{d.shift:>15.4g}{norm:>9}{spreads}{left_out}"
    noise = (1 / first.manifest.tokens + 1 / second.manifest.tokens) ** 0.5
    yield f"shift in deviations (independent rows would show {noise:.2g}); norm, std: {second.path} over the first"
    if only := [s for s in (*first.manifest.sites, *second.manifest.sites) if s not in found]:
        yield f"sites of one only: {', '.join(only)}"
