"""End-to-end training under Ray Train: each worker runs the language model itself."""

from __future__ import annotations

import pytest

from tests.cluster.test_train import assert_same
from tests.training import texts
from xlc_ray.cluster.train import train
from xlc_ray.config import UserError
from xlc_ray.training import train_alone

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_shards_on_workers_give_the_result_of_one_process(cluster, tmp_path):
    texts.make_store(tmp_path)
    changes = {"train.precision": "float64", "train.end_to_end": {"downstream": 0.1}, "cluster.tensor_parallel": 2}
    config = texts.settings(tmp_path, changes)
    last = train(config)
    alone = config.override({"out": config.out + "_alone", "cluster.tensor_parallel": 1})
    want = train_alone(alone)
    assert_same(config, alone)
    assert last["step"] == want["step"] == 12
    for key in ("loss", "kl", "downstream", "l0"):
        assert last[key] == pytest.approx(want[key], rel=1e-6)
    # What only the model can tell, and a worker therefore finds, reaches the user in one line too.
    end = {"dictionary.wiring": {"kind": "sae", "layers": [3]}, "out": config.out + "_end"}
    with pytest.raises(UserError, match=r"no block of the model comes after resid_post\.3"):
        train(config.override(end))
