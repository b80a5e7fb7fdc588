import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub is wrong
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import beartype  # noqa: F401  (nnsight patches `object`; afterwards beartype cannot be imported)
import jaxtyping
import torch

# Every public shape in the mathematics is checked while the tests run.
jaxtyping.install_import_hook("xlc_ray.dictionary", "beartype.beartype")
torch.set_num_threads(1)
