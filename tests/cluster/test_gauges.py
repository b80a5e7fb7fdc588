"""Metrics of a run on Ray's metrics endpoint, where the dashboard and Prometheus find them."""

from __future__ import annotations

import time

import pytest

from tests.cluster.endpoint import scraped
from tests.runs import small_run_in
from xlc_ray.cluster.gauges import METRICS, Gauges, resident_bytes
from xlc_ray.training import train_alone

pytestmark = pytest.mark.cluster


def test_all_that_training_measures_appears_with_its_labels(cluster, tmp_path):
    """Each metric of the table but a GPU's memory; of families, the members that this run has."""
    gauges = Gauges("run_seven", trial="lr=0.01", rank=3)
    resample = {"every": 4, "tokens": 40}
    config = small_run_in(tmp_path)({"train.resample": resample, "train.log_every": 1})
    last = train_alone(config, gauges.set)
    gauges.set({"held_out/fvu": 0.25})  # as a sweep measures
    wanted = {(m.name, "") for m in METRICS if m.label is None}
    wanted |= {("group_l0", "0"), ("group_l0", "1"), ("loss_term", "reconstruction"), ("loss_term", "auxk")}
    wanted |= {("memory_bytes", "3"), ("held_out", "fvu")}
    found, deadline = {}, time.monotonic() + 60
    while found.keys() < wanted and time.monotonic() < deadline:
        time.sleep(1)
        found = scraped(cluster.nodes()[0]["MetricsExportPort"], "run_seven")
    assert found.keys() == wanted
    for name in ("loss", "explained_variance", "l0", "dead_features", "tokens_per_s", "step_s", "data_wait"):
        assert found[name, ""][0] == pytest.approx(last[name])
    assert found["group_l0", "1"][0] == pytest.approx(last["l0/group_1"])
    assert found["memory_bytes", "3"][0] == pytest.approx(resident_bytes(), rel=0.2)
    assert found["held_out", "fvu"][0] == 0.25
    job = cluster.get_runtime_context().get_job_id()
    for _, labels in found.values():
        assert (labels["run"], labels["trial"], labels["job_id"]) == ("run_seven", "lr=0.01", job)


def test_step_time_and_speed_agree(tmp_path):
    lines = []
    config = small_run_in(tmp_path)()
    train_alone(config, lines.append)
    for line in lines:
        assert line["step_s"] * line["tokens_per_s"] == pytest.approx(config.train.batch_tokens)
