"""One small Ray cluster for all tests here."""

from __future__ import annotations

import os

import pytest

from xlc_ray.config import Config, load_config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="session")
def cluster():
    """Four logical CPUs. The dashboard is on, as in jobs: Ray Train cleans up through it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def asset():
    """Absolute path of something that ships with the project."""
    return lambda name: os.path.join(ROOT, "configs/assets", name)


@pytest.fixture(scope="session")
def tiny_config(asset):
    """Settings of a quick generation with the smallest model: tiny_config(directory, {dotted override: value})."""

    def make(directory, changes: dict | None = None) -> Config:
        base = {
            "out": f"{directory}/run",
            "source.path": f"{directory}/store",
            "model.name": asset("tiny-austen-gpt2-d64"),
            "text.dataset": asset("austen.txt"),
            "generate.tokens": 5000,
            "generate.held_out_tokens": 600,
            "generate.chunk_tokens": 1500,
            "generate.batch_windows": 8,
            "generate.documents_per_task": 8,
            "text.held_out_fraction": 0.2,
            "cluster.tensor_parallel": 1,
        }
        return load_config(os.path.join(ROOT, "configs/quickstart.yaml"), base | (changes or {}))

    return make
