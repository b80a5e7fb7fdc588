"""The Grafana dashboard: every expression is of a metric that is exported, and Ray's provisioning finds the file."""

from __future__ import annotations

import json
import re

import pytest

from xlc_ray.cluster import grafana
from xlc_ray.cluster.gauges import LABELS, METRICS
from xlc_ray.config import UserError

BOARD = grafana.dashboard()
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def names(expression):
    """The metrics that a PromQL expression reads: names before a selector."""
    return re.findall(r"\b([a-z_]\w*)\{", expression)


def test_a_panel_a_metric_and_no_metric_that_nobody_exports():
    assert [name for e in EXPRESSIONS for name in names(e)] == [f"ray_xlc_{metric.name}" for metric in METRICS]


def test_expressions_choose_and_group_by_labels_that_the_metrics_carry():
    for metric, expression in zip(METRICS, EXPRESSIONS, strict=True):
        carried = {*LABELS, *([metric.label] if metric.label else [])}
        by = re.search(r"by \(([^)]*)\)", expression).group(1)
        assert set(by.split(", ")) == carried
        assert set(re.findall(r"(\w+)=~", expression)) == set(LABELS)


def test_variables_of_expressions_are_defined():
    defined = {variable["name"] for variable in BOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__all"} == defined  # $__all is Grafana's


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--grafana: no directory"):
        grafana.install(str(tmp_path / "nowhere"))


@pytest.mark.cluster
def test_lies_where_ray_tells_grafana_to_look(cluster, monkeypatch):
    import yaml

    metrics = cluster.init(ignore_reinit_error=True).address_info["session_dir"] + "/metrics"
    monkeypatch.setenv(grafana.ROOT, metrics)
    path = grafana.install(None)
    with open(f"{metrics}/grafana/provisioning/dashboards/default.yml") as file:
        (provider,) = yaml.safe_load(file)["providers"]
    assert path == f"{provider['options']['path']}/{grafana.FILE}"
    with open(path) as file:
        assert json.load(file) == BOARD
