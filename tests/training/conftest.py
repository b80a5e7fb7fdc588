import pytest

from tests.runs import small_run_in


@pytest.fixture
def small_run(tmp_path):
    """small_run({dotted override: value}) → settings of a run of 12 steps over a store of 203 rows."""
    return small_run_in(tmp_path)
