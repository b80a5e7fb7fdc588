"""The Grafana dashboard of runs, drawn from the table of gauges: a panel a metric, in rooms.

Ray writes a provisioning of Grafana into its session's folder, which loads every dashboard beside Ray's own and looks
there for new ones every ten seconds. So a file in that folder is all that it takes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from xlc_ray.cluster.gauges import LABELS, METRICS, PREFIX, Metric
from xlc_ray.config import UserError

FILE = "xlc_ray_grafana_dashboard.json"
FOLDER = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"
"""Ray's own variable: where its dashboards go if not into the session."""
ROOT = "RAY_METRICS_OUTPUT_ROOT"
COLUMNS, WIDTH, HEIGHT = 2, 12, 8

Json = dict[str, Any]


def install(directory: str | None) -> str:
    """Write the dashboard into a directory (default: where Ray's lie). Returns the file. Raises UserError."""
    folder = Path(directory) if directory else default_folder()
    if not folder.is_dir():
        raise UserError(f"--grafana: no directory {folder}; start Ray first, or give the folder of its dashboards")
    path = folder / FILE
    path.write_text(json.dumps(dashboard(), indent=1) + "\n")
    return str(path)


def default_folder() -> Path:
    """Where the newest Ray session of this host has its dashboards."""
    if folder := os.environ.get(FOLDER):
        return Path(folder)
    base = os.environ.get("RAY_TMPDIR") or (tempfile.gettempdir() if os.name == "nt" else "/tmp")
    root = os.environ.get(ROOT) or f"{base}/ray/session_latest/metrics"
    return Path(root) / "grafana/dashboards"


def dashboard() -> Json:
    """The whole dashboard, as Grafana reads it."""
    return {
        "uid": "xlcRayDashboard",
        "title": "Sparse dictionaries",
        "tags": ["xlc_ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), *(_variable(label) for label in LABELS)]},
        "panels": list(_panels()),
    }


def _source() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 2}


def _variable(label: str) -> Json:
    query = f"label_values(ray_{PREFIX}step, {label})"
    return {
        "name": label.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def _panels() -> Iterator[Json]:
    number, y = 1, 0
    for room, metrics in groupby(METRICS, lambda metric: metric.room):
        yield {"id": number, "type": "row", "title": room, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}, "panels": []}
        number, y = number + 1, y + 1
        members = list(metrics)
        for i, metric in enumerate(members):
            place = {"h": HEIGHT, "w": WIDTH, "x": WIDTH * (i % COLUMNS), "y": y + HEIGHT * (i // COLUMNS)}
            yield _panel(metric) | {"id": number, "gridPos": place}
            number += 1
        y += HEIGHT * -(-len(members) // COLUMNS)


def _panel(metric: Metric) -> Json:
    member = f" {{{{{metric.label}}}}}" if metric.label else ""
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "type": "timeseries",
        "title": metric.about,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": metric.unit}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": "A",
                "datasource": source,
                "expr": _expression(metric),
                "legendFormat": "{{run}} {{trial}}" + member,
            }
        ],
    }


def _expression(metric: Metric) -> str:
    """One line a run and member: whichever process of a restarted run set the gauge last."""
    chosen = ", ".join(f'{label}=~"${label.capitalize()}"' for label in LABELS)
    by = ", ".join([*LABELS, *([metric.label] if metric.label else [])])
    return f"max by ({by}) (ray_{PREFIX}{metric.name}{{{chosen}}})"
