"""Generation on a cluster gives what one process would, whatever happens on the way."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cluster.actors import actors
from xlc_ray.activations import store
from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.activations.text import (
    chunk_plan,
    is_held_out,
    load_documents,
    load_tokenizer,
    pack,
    read_documents,
    special_ids,
    token_mask,
)
from xlc_ray.cluster import plan
from xlc_ray.cluster.generate import generate
from xlc_ray.config import UserError

pytestmark = pytest.mark.cluster

SITES = ("mlp_in.0", "mlp_out.3", "resid_post.1")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_config):
    return tiny_config(tmp_path_factory.mktemp("generate"), {"generate.sites": SITES})


@pytest.fixture(scope="module")
def summary(cluster, config):
    return generate(config)


@pytest.fixture(scope="module")
def stores(summary, config):
    """{held out?: opened store}"""
    return {False: store.open_store(config.source.path), True: store.open_store(config.source.path + "/held_out")}


@pytest.fixture
def copy(summary, config, tmp_path):
    """Settings of a complete copy of the store, to be damaged."""
    shutil.copytree(config.source.path, tmp_path / "store")
    return config.override({"source.path": str(tmp_path / "store")})


def contents(path: str) -> dict[str, bytes]:
    """Chunk files of both splits."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(Path(path).rglob("chunk_*.hdf5"))}


def reference_plan(config, held_out):
    """The same plan without Ray."""
    tokenizer, documents = load_tokenizer(config.model), list(read_documents(config.text))
    special, step = special_ids(tokenizer), config.generate.documents_per_task

    def packed():
        for i in range(0, len(documents), step):
            chosen = [d for d in documents[i : i + step] if is_held_out(d, config.text.held_out_fraction) is held_out]
            windows = pack(chosen, tokenizer, config.text)
            yield windows, token_mask(windows, special, config.text)

    tokens = config.generate.held_out_tokens if held_out else config.generate.tokens
    return list(chunk_plan(packed(), tokens, config.generate.chunk_tokens, config.seed))


def assert_equals_in_process_harvest(config):
    torch.set_num_threads(1)  # as many as the actor has
    model = LanguageModel(config.model)
    for held_out, path in ((False, config.source.path), (True, config.source.path + "/held_out")):
        opened, expected = store.open_store(path), reference_plan(config, held_out)
        opened.verify()
        assert opened.chunk_rows == [chunk.rows for chunk in expected]
        for chunk in expected:
            text = opened.windows(chunk.index)
            assert np.array_equal(text.windows.tokens, chunk.windows.tokens)
            assert np.array_equal(text.row_window, chunk.row_window)
            assert np.array_equal(text.row_position, chunk.row_position)
            values = harvest_chunk(model, chunk, SITES, config.generate.batch_windows, config.generate.dtype)
            found = opened.read(chunk.index, 0, chunk.rows, SITES)
            assert all(np.array_equal(found[site], values[site]) for site in SITES)


def test_equals_an_in_process_harvest_of_the_same_plan_bit_for_bit(summary, config):
    assert_equals_in_process_harvest(config)


def test_stores_exactly_the_tokens_asked_for_each_once(stores, summary):
    for held_out, tokens in ((False, 5000), (True, 600)):
        opened = stores[held_out]
        opened.verify()
        rows = {
            (chunk, window, position)
            for chunk in range(len(opened.chunk_rows))
            for window, position in zip(
                opened.windows(chunk).row_window, opened.windows(chunk).row_position, strict=True
            )
        }
        assert len(rows) == opened.manifest.tokens == sum(opened.chunk_rows) == tokens
        assert max(opened.chunk_rows) <= 1500
        windows = np.concatenate([opened.windows(c).windows.tokens for c in range(len(opened.chunk_rows))])
        assert len(np.unique(windows, axis=0)) == len(windows)
    assert (summary["tokens"], summary["held_out_tokens"], summary["made"]) == (5000, 600, summary["chunks"])
    assert summary["bytes"] == sum(len(data) for data in contents(summary["path"]).values())


def test_training_and_held_out_documents_are_disjoint(stores, config):
    tokenizer = load_tokenizer(config.model)
    documents = load_documents(config.text)["text"]

    def text_of(opened):
        for chunk in range(len(opened.chunk_rows)):
            windows = opened.windows(chunk).windows
            yield from (tokenizer.decode(t[1:n]) for t, n in zip(windows.tokens, windows.length, strict=True))

    held_out = {d for d in documents if is_held_out(d, config.text.held_out_fraction)}
    end = tokenizer.eos_token
    for split, opened in stores.items():
        pieces = [piece for text in text_of(opened) for piece in text.split(end) if len(piece) > 80]
        assert len(pieces) >= 3
        # A long piece stands in one document only, and that document belongs to this split.
        assert all(any(piece in d for d in held_out) is split for piece in pieces)


def test_int8_is_half_the_bytes_and_says_what_it_lost(stores, config, tmp_path):
    changed = config.override({"generate.dtype": "int8", "source.path": str(tmp_path / "store")})
    made = generate(changed)
    opened, exact = store.open_store(changed.source.path), stores[False]
    opened.verify()
    assert made["bytes"] < 0.6 * sum(len(data) for data in contents(config.source.path).values())
    assert set(opened.manifest.lost) == set(SITES)
    for site in SITES:
        found, wanted = (
            torch.cat([store.decode(s.read(c, 0, n, [site])[site], s.dtype) for c, n in enumerate(s.chunk_rows)])
            for s in (opened, exact)
        )
        lost = ((found - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
        assert 0 < opened.manifest.lost[site] < 3e-4
        assert lost < 4e-4, "what int8 and bfloat16 lose, together"


def test_rerun_of_a_complete_store_touches_nothing(summary, config):
    before = {f: f.stat().st_mtime_ns for f in Path(config.source.path).rglob("*") if f.is_file()}
    assert generate(config) | {"seconds": 0} == summary | {"made": 0, "seconds": 0, "tokens_per_s": 0.0}
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_rerun_makes_only_what_is_missing_and_the_same(copy, config):
    path = Path(copy.source.path)
    complete = contents(config.source.path)
    (path / "chunk_1.hdf5").unlink()
    before = {f: f.stat().st_mtime_ns for f in path.rglob("chunk_*.hdf5")}
    assert generate(copy)["made"] == 1
    assert contents(copy.source.path) == complete
    assert {f: f.stat().st_mtime_ns for f in before} == before
    store.open_store(copy.source.path).verify()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"text.context": 64}, "text.context = 128, not 64"),
        ({"generate.tokens": 4000}, "tokens = 5000, not 4000"),
        ({"generate.sites": ["mlp_in.0"]}, "sites."),
    ],
)
def test_other_settings_into_the_same_path_are_refused(summary, config, change, named):
    with pytest.raises(UserError) as error:
        generate(config.override(change))
    assert named in str(error.value)
    assert config.source.path in str(error.value)


def test_mistakes_are_named_before_anything_starts(config, tmp_path, monkeypatch):
    monkeypatch.setattr("xlc_ray.cluster.plan.connect", lambda: pytest.fail("a cluster was started"))
    fresh = config.override({"source.path": str(tmp_path / "store")})
    for change, named in (
        ({"generate.sites": ["mlp_in.4"]}, "mlp_in.4: the model has no such layer; allowed: 0 to 3"),
        ({"generate.sites": ["mlp.0"]}, "kinds: resid_pre"),
        ({"text.column": "body"}, "text.column: 'body'"),
        ({"model.name": str(tmp_path)}, "model.name"),
        ({"text.held_out_fraction": 0}, "text.held_out_fraction: 0 leaves one split without documents"),
    ):
        with pytest.raises(UserError) as error:
            generate(fresh.override(change))
        assert named in str(error.value)
        assert "\n" not in str(error.value)


def test_too_little_text_says_so_and_leaves_the_path_free(cluster, config, tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(f"Paragraph {i} says little." for i in range(400)))
    short = config.override(
        {"source.path": str(tmp_path / "store"), "text.dataset": str(tmp_path / "short.txt"), "text.paragraphs": 1}
    )
    with pytest.raises(UserError, match=r"text ended after \d+ of 5000 tokens"):
        generate(short)
    # An attempt that made nothing does not bind the next one to its settings.
    fewer = short.override({"generate.tokens": 500})
    plan.claim(fewer.source.path, plan.identities(fewer, plan.site_widths(fewer))[False])
    assert store.read_plan(fewer.source.path) is None


@pytest.mark.slow
def test_a_killed_model_actor_changes_nothing(cluster, config, tmp_path):
    # Many small chunks, windows one by one: slow enough to be interrupted between two chunks.
    many = {"generate.tokens": 15000, "generate.chunk_tokens": 200, "generate.batch_windows": 1}
    small = config.override({"source.path": str(tmp_path / "store")} | many)
    earlier, killed, finished = set(harvesters()), [], threading.Event()

    def kill_in_the_middle():
        pid = 0
        while not finished.is_set():
            if not pid:
                pid = next((pid for pid in harvesters() if pid not in earlier), 0)
            elif done := list((tmp_path / "store").rglob("records/*.json")):
                os.kill(pid, signal.SIGKILL)
                killed.append(len(done))
                return
            time.sleep(0.005)

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    made = generate(small)
    finished.set()
    killer.join()
    assert killed, "the actor was to be killed"
    assert killed[0] < made["made"] == made["chunks"]
    assert_equals_in_process_harvest(small)


def harvesters() -> list[int]:
    """Process ids of the language-model actors."""
    return [actor.pid for actor in actors("Harvester")]
