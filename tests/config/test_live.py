"""`source: {kind: live}`: what goes together, and what is said of what does not."""

from __future__ import annotations

import pytest

from tests.config.tree import ROOT
from xlc_ray.config import UserError, load_config

QUICKSTART = ROOT / "configs/quickstart.yaml"


def test_one_word_makes_a_run_live_and_tee_is_where_its_store_goes():
    live = load_config(QUICKSTART, {"source.kind": "live"}).source
    assert (live.kind, live.path, live.tee) == ("live", "data/quickstart", None)
    teed = load_config(QUICKSTART, {"source": {"kind": "live", "tee": "data/kept"}})
    assert (teed.source.path, teed.source.tee) == ("data/kept", "data/kept")
    assert teed.override({"seed": 1}).source == teed.source


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"source": {"kind": "live"}}, "source.path: missing"),
        ({"source": {"kind": "live", "path": "a", "tee": "b"}}, "source: tee = b already names the directory; leave"),
        ({"source": {"kind": "live", "path": "a", "held_chunks": 1}}, "source.held_chunks: 1 should be greater"),
        ({"source": {"kind": "live", "path": "a", "mix_chunks": None}}, "source.mix_chunks: None should be"),
        (
            {"source.kind": "live", "train.resample": {"every": 10, "tokens": 10}},
            "train.resample: reads rows that live training has not kept; use train.loss.auxk or train.loss.ghost",
        ),
        (
            {"source.kind": "live", "generate.dtype": "int8"},
            "generate.dtype: int8 rounds rows that are stored",
        ),
        (
            {"source.kind": "live", "generate.dtype": "bfloat16_zstd"},
            "generate.dtype: bfloat16_zstd is for files, not for source.kind: live",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(changes, line):
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, changes)
    assert str(error.value).removeprefix(f"{QUICKSTART}: ").startswith(line)
