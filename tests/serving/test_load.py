"""Many clients at once. tests/benchmarks/serve.py is the same for as long as one likes."""

import pytest

from tests.benchmarks import serve


@pytest.mark.slow
def test_mixed_clients_get_what_was_stored_and_memory_stays_bounded():
    found = serve.run(20, 64, 2)
    assert found["wrong"] == 0
    assert found["idle_clients"] == 0
    assert found["uploads"] > 20
    assert found["refused"] > 5
    assert found["alive"]
    assert found["files_elsewhere"] == 0
    # 64 bodies of 4 MB, and as many slices, would be 512 MB.
    assert found["memory_peak"] - found["memory_before"] < 250e6
