"""The cases of faults.py, on a Ray cluster of several nodes that has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster.cases import CASES
from tests.cluster.faults import possible
from tests.cluster.nodes import ROOT
from tests.cluster.stage import EVERY

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """{case: what became of it}"""
    file = tmp_path_factory.mktemp("faults") / "table.json"
    command = [sys.executable, "tests/cluster/faults.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2700, check=False)
    assert file.exists(), done.stdout + done.stderr
    found = {line["case"]: line for line in json.loads(file.read_text())}
    assert list(found) == possible(), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_run_goes_on_and_ends_as_if_nothing_had_happened(table, case):
    if case not in table:
        pytest.skip("network namespaces that reach each other need root")
    found = table[case]
    assert found["recovered"], found.get("error")
    assert found["parameters_equal"]
    # A checkpoint that was cut does not count, nor do the steps made while it was being written.
    assert 0 <= found["steps_lost"] <= (2 * EVERY if case == "checkpoint_cut" else EVERY)
