"""Metrics of a run on Ray's metrics endpoint, where the dashboard and Prometheus find them."""

from __future__ import annotations

import time
import urllib.request

import pytest

from xlc_ray.cluster.gauges import Gauges

pytestmark = pytest.mark.cluster


def test_metrics_appear_under_their_names_with_the_run(cluster):
    gauges = Gauges("run_seven")
    port = cluster.nodes()[0]["MetricsExportPort"]
    found, deadline = [], time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < deadline:
        gauges.set({"explained_variance": 0.875, "l0/group_1": 12.0})
        time.sleep(1)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        found = [line for line in page.splitlines() if line.startswith("ray_xlc_") and 'run="run_seven"' in line]
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in found}
    assert values == {"ray_xlc_explained_variance": 0.875, "ray_xlc_l0_group_1": 12.0}
