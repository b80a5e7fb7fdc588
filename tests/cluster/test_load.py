"""A long training in a minute, and a large store: memory stays what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.activations.build import identity
from tests.cluster.conftest import ROOT
from xlc_ray.activations import source, store
from xlc_ray.activations.order import Order
from xlc_ray.cluster.gauges import resident_bytes

pytestmark = pytest.mark.slow

CHUNKS, ROWS, LAYERS = 1000, 10_000, 34
SITES = {f"resid_post.{layer}": 2 for layer in range(LAYERS)}


@pytest.mark.cluster
def test_a_minute_of_training_does_not_grow():
    script = [sys.executable, "-m", "tests.cluster.soak", "--minutes", "1"]
    env = {**os.environ, "PYTHONPATH": ROOT, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert set(found["memory"]) == {"driver", "rank 0", "rank 1"}
    assert found["steps"] > 100


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1,000 chunks of 10,000 rows at 34 sites: one chunk under 1,000 names, as all rows of a chunk number it alone."""
    path = tmp_path_factory.mktemp("large")
    store.begin(str(path), identity(SITES))
    row = torch.arange(ROWS)
    values = torch.stack([row // 256, row % 256], dim=1).float()  # bfloat16 counts exactly to 256
    arrays = {site: store.encode(values, "bfloat16", site) for site in SITES}
    record = store.write_chunk(str(path), 0, arrays, "bfloat16")
    for index in range(1, CHUNKS):
        for name in ("chunk_{}.hdf5", "moments/chunk_{}.npz"):
            os.link(path / name.format(0), path / name.format(index))
        copy = record.model_copy(update={"index": index, "file": f"chunk_{index}.hdf5"})
        (path / f"records/chunk_{index}.json").write_text(copy.model_dump_json())
    store.write_plan(str(path), [ROWS] * CHUNKS)
    store.finish(str(path), identity(SITES))
    return str(path)


def test_ten_million_rows_in_a_thousand_chunks_are_read_in_bounded_memory(large):
    before = resident_bytes()
    data = store.open_store(large)
    order = Order(data.chunk_rows, seed=0, slice_rows=64, window_slices=256)
    assert (data.manifest.tokens, len(data.chunk_rows)) == (10_000_000, 1000)
    batches, rows = 80, 2048
    expected = np.concatenate([order.window(w).row for w in range(11)])
    chunks = np.concatenate([order.window(w).chunk for w in range(11)])
    position = 0
    for batch in source.batches(data, order, list(SITES), source.Share(rows, 0, batches)):
        wanted = expected[position : position + rows]
        for values in batch.values():
            high, low = values.float().T
            assert np.array_equal((high * 256 + low).numpy().astype(np.int64), wanted)
        position += rows
    assert position == batches * rows
    assert len(set(chunks[:position])) > 900  # nearly all chunks were read from
    assert resident_bytes() - before < 300e6  # of 1.36 GB
