"""A directory of live training belongs to what made its sample: anything else is refused before Ray is joined."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.activations.build import arrays, chunk_text, identity, make
from tests.cluster.prepared import LIVE, settings_of
from xlc_ray.activations import store
from xlc_ray.cluster import plan
from xlc_ray.cluster import train as job
from xlc_ray.cluster.generators import Asker, Generators
from xlc_ray.config import UserError

ROWS = [300, 300, 300]


class Joined(Exception):
    """Nothing was refused before the cluster is joined."""


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """settings(changes): of live training on text of three chunks, a sample of two, and a held-out part."""

    def join():
        raise Joined

    monkeypatch.setattr(job, "connect", join)
    path = tmp_path / "live"
    settings = partial(settings_of, tmp_path)
    config = settings({"source": {**LIVE, "path": str(path)}})
    widths = plan.site_widths(config)
    make(path / "held_out", [40], sites=widths)
    store.begin(str(path), plan.identities(config, widths)[False])
    for index, count in enumerate(ROWS):
        store.write_text(str(path), chunk_text(index, count))
    for index in (0, 1):
        store.write_chunk(str(path), index, arrays(300, 300 * index, sites=widths), "bfloat16")
    store.write_plan(str(path), ROWS)
    return lambda changes=None: settings({"source": config.source.model_dump(), **(changes or {})})


def test_what_makes_no_chunk_may_differ(prepared):
    free = {"seed": 5, "generate.tokens": 900, "text.dataset": "elsewhere.txt", "train.lr": 0.5}
    with pytest.raises(Joined):
        job.train(prepared(free))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.dtype": "bfloat16"}, r"model\.dtype = 'float32', not 'bfloat16'"),
        ({"generate.dtype": "float32"}, "dtype = 'bfloat16', not 'float32'"),
    ],
)
def test_another_type_of_model_or_rows_is_refused(prepared, changes, line):
    with pytest.raises(UserError, match=f"live: was made with {line}; choose another path or remove it"):
        job.train(prepared(changes))
    assert not Path(prepared().out).exists(), "before anything is written"


def test_a_fine_tuned_model_of_the_same_widths_is_refused(prepared, asset, tmp_path):
    tuned = tmp_path / "tiny-tuned"
    shutil.copytree(asset("tiny-austen-gpt2-d64"), tuned)
    with pytest.raises(
        UserError, match=r"model\.name: .*tiny-tuned; the activations in .* are of tiny-austen-gpt2-d64"
    ):
        job.train(prepared({"model.name": str(tuned)}))


def test_chunks_are_not_given_to_a_group_whose_other_replicas_are_not_known_any_more(prepared):
    """As Ray repeats a request to an actor that it has started again: the chunks from the group's beginning on would
    be held for replicas that do not ask, and what this one waits for never begun."""

    async def asked(first: bool) -> list:
        generators = Generators(prepared(), ["mlp_in.0"])

        async def get(chunk, stored):
            chunk.made.set_result(chunk.need.chunk)

        generators._get = get
        asking = generators.chunks(Asker("1", 0, 0, 2), 3, [2], first)
        return await asyncio.wait_for(asking, timeout=20)

    assert asyncio.run(asked(True)) == [2]
    with pytest.raises(RuntimeError, match="the actor that held the chunks of live training died"):
        asyncio.run(asked(False))


def test_identities_compare_in_full_unless_told():
    made, asked = identity({"mlp_in.0": 6}), identity({"mlp_in.0": 6}, seed=1)
    store.compare("x", made, asked, ("model.",))
    with pytest.raises(UserError, match="x: was made with seed = None, not 1"):
        store.compare("x", made, asked)
