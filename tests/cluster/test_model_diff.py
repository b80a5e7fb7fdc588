"""A model-diff crosscoder from text to report: two models harvested and measured on a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.test_shares import assert_alike
from tests.tuned import save_tuned
from xlc_ray import files
from xlc_ray.activations import store
from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import load_models
from xlc_ray.cluster.evaluate import evaluate
from xlc_ray.cluster.generate import generate
from xlc_ray.cluster.session import resolve
from xlc_ray.config import UserError
from xlc_ray.dictionary.checkpoint import load_dictionary
from xlc_ray.training import train_alone

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SITES = ("resid_post.2", "resid_post.2@base")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_config, asset):
    directory = tmp_path_factory.mktemp("diff")
    base = asset("tiny-austen-gpt2-d64")
    changes = {
        "model.name": save_tuned(base, directory / "tuned"),
        "base_model": {"name": base, "replace_tokens": [[" the", " a"]]},
        "dictionary.wiring": {"kind": "model_diff", "layer": 2},
        "dictionary.features": 64,
        "generate.tokens": 3000,
        "generate.held_out_tokens": 600,
        "text.ignore_first": 3,
        "evaluate.windows": 4,
        "train.steps": 30,
        "train.batch_tokens": 128,
    }
    return tiny_config(directory, changes)


@pytest.fixture(scope="module")
def stores(cluster, config):
    """{held out?: opened store}"""
    assert generate(config)["sites"] == list(SITES)
    return {held_out: store.open_store(config.source.path + held_out) for held_out in ("", "/held_out")}


def test_a_row_is_one_token_to_both_models(stores, config):
    torch.set_num_threads(1)
    pair = load_models(config, SITES, "cpu")
    models = {SITES[0]: LanguageModel(config.model), SITES[1]: LanguageModel(config.base_model)}
    the, a = (pair.model.tokenizer.encode(word)[0] for word in (" the", " a"))
    for opened in stores.values():
        text = opened.windows(0)
        tokens, length = torch.from_numpy(text.windows.tokens), torch.from_numpy(text.windows.length)
        assert text.row_position.min() == 3
        assert (tokens == the).any()
        found = opened.read(0, 0, opened.chunk_rows[0], SITES)
        for site, read in ((SITES[0], tokens), (SITES[1], tokens.where(tokens != the, a))):
            whole = models[site].harvest(read, length, ["resid_post.2"])["resid_post.2"]
            stored = store.decode(found[site], opened.dtype)
            rows = whole[torch.from_numpy(text.row_window).long(), torch.from_numpy(text.row_position).long()]
            torch.testing.assert_close(stored, rows, rtol=1e-2, atol=2e-2)  # bfloat16 on disk


def test_held_out_windows_are_none_of_the_training_windows(stores):
    windows = {
        name: {w.tobytes() for c in range(len(s.chunk_rows)) for w in s.windows(c).windows.tokens}
        for name, s in stores.items()
    }
    assert windows[""].isdisjoint(windows["/held_out"])


def test_made_again_it_is_the_same_store(stores, config, tmp_path):
    again = config.override({"source.path": str(tmp_path / "store")})
    generate(again)
    one, two = (
        {str(f.relative_to(path)): f.read_bytes() for f in sorted(Path(path).rglob("chunk_*.hdf5"))}
        for path in (config.source.path, again.source.path)
    )
    assert one == two


def test_another_base_or_other_replacements_are_refused(stores, config):
    for change, named in (
        ({"base_model.replace_tokens": []}, "base_model.replace_tokens"),
        ({"base_model.dtype": "bfloat16"}, "base_model.dtype = 'float32', not 'bfloat16'"),
    ):
        with pytest.raises(UserError, match=named):
            generate(config.override(change))


@pytest.fixture(scope="module")
def trained(stores, config):
    train_alone(resolve(config))
    return resolve(config)


def test_trained_and_measured(trained):
    config = trained
    found = evaluate(config.out)
    assert json.loads(files.read_bytes(config.out + "/eval.json"))["model_diff"] == found["model_diff"]
    assert list(found["sites"]) == list(SITES)
    assert found["model_diff"]["tokens"] == found["tokens"] == 600
    assert sum(found["model_diff"]["classes"].values()) == found["model_diff"]["alive"] > 0
    assert set(found["replacement"]["models"]) == {"model", "base_model"}
    page = files.read_bytes(found["report"]).decode()
    assert "Model-diff crosscoder of tuned and tiny-austen-gpt2-d64" in page
    assert "Features by relative norm" in page
    assert page.count("<svg") == 5
    statistics = store.open_store(config.source.path).statistics()
    spreads = [np.sqrt((statistics[s].std ** 2).mean() + (statistics[s].mean ** 2).mean()) for s in SITES]
    scale = load_dictionary(config.out)[0].write_scale
    np.testing.assert_allclose(scale[[0, 64]].numpy(), spreads, rtol=1e-3)


def test_three_workers_measure_what_one_does(trained):
    # Batches so small that each task has rows, and one of them no windows.
    small = {"evaluate.batch_tokens": 100, "evaluate.batch_windows": 2}
    one, three = (evaluate(trained.out, small | {"evaluate.workers": workers}) for workers in (1, 3))
    assert_alike(three, one)
