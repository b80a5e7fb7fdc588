"""A run's metrics as Ray metrics: `ray_xlc_<name>{run="…"}` on the metrics endpoint and in the dashboard."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class Gauges:
    """Gauges of one run, made as metrics first appear."""

    def __init__(self, run: str):
        self.run = run
        self.gauges: dict[str, Gauge] = {}

    def set(self, metrics: Mapping[str, float]) -> None:
        """Publish the newest values."""
        for name, value in metrics.items():
            if name not in self.gauges:
                safe = re.sub(r"\W", "_", name)
                self.gauges[name] = Gauge(f"xlc_{safe}", description=f"training metric {name}", tag_keys=("run",))
                self.gauges[name].set_default_tags({"run": self.run})
            self.gauges[name].set(float(value))
