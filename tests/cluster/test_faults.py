"""The cases of faults.py, on a Ray cluster of several nodes that has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster.faults import CASES, EVERY
from tests.cluster.nodes import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """{case: what became of it}"""
    file = tmp_path_factory.mktemp("faults") / "table.json"
    command = [sys.executable, "tests/cluster/faults.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert file.exists(), done.stdout + done.stderr
    return dict(zip(CASES, json.loads(file.read_text()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_on_and_ends_as_if_nothing_had_happened(table, case):
    found = table[case]
    assert found["recovered"]
    assert found["parameters_equal"]
    assert 0 <= found["steps_lost"] <= EVERY
