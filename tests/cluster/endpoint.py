"""What Ray's metrics endpoint says of a run."""

from __future__ import annotations

import re
import urllib.request

LINE = re.compile(r"^ray_xlc_(\w+)\{(.*)\} (\S+)$", re.M)


def scraped(port: int, run: str) -> dict[tuple[str, str], tuple[float, dict[str, str]]]:
    """{(name, member of a family): (value, labels)} of what the endpoint at a port of this host has of a run."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    found = {}
    for name, text, value in LINE.findall(page):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', text))
        if labels["run"] == run:
            member = next((labels[key] for key in ("group", "term", "metric", "rank") if key in labels), "")
            found[name, member] = float(value), labels
    return found
