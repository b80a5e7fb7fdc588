import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub is wrong
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import beartype  # noqa: F401  (nnsight patches `object`; afterwards beartype cannot be imported)
import jaxtyping
import pytest
import torch

# Every public shape in the mathematics is checked while the tests run.
jaxtyping.install_import_hook("xlc_ray.dictionary", "beartype.beartype")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one process runs: a file, whose tests share fixtures; all that need Ray, as two clusters on a machine are
    taken for each other."""
    for item in items:
        group = "cluster" if item.path.parent.name == "cluster" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
