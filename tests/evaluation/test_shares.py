"""Shares of the held-out rows and windows, measured apart and merged, give what one process finds."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.dictionary import make
from tests.tuned import save_tuned
from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.pair import ModelPair
from xlc_ray.config import Model, UserError
from xlc_ray.dictionary import wiring
from xlc_ray.evaluation import Share, ablate_share, ablated_features, finish, measure, measure_share
from xlc_ray.evaluation.held_out import WHOLE, held_out_batches, held_out_windows
from xlc_ray.evaluation.model_diff import ModelDiff
from xlc_ray.evaluation.pair import evaluate_pair
from xlc_ray.evaluation.reconstruction import evaluate_reconstruction

from .conftest import TINY

EXACT = ("l0", "dead_features", "tokens", "windows", "top1_agreement", "features", "feature_density", "reads", "writes")
"""Counts and quotients of counts."""


def merged(parts):
    """The parts as they arrive from other processes, added to the first."""
    whole, *others = pickle.loads(pickle.dumps(parts))
    for other in others:
        whole.merge(other)
    return whole


def assert_alike(found, expected, path=""):
    """Equal, to the last digit where EXACT is above, else but for the order of float64 additions."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_alike(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for n, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_alike(mine, theirs, f"{path}.{n}")
    elif isinstance(expected, float) and not any(f".{name}" in path for name in EXACT):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), path
    else:
        assert found == expected, path


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_every_batch_is_taken_once_in_order(sizes, workers):
    batches = [(chunk, 0, size) for chunk, size in enumerate(sizes)]
    taken = [Share(n, workers).take(batches) for n in range(workers)]
    assert [batch for part in taken for batch in part] == batches
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


@pytest.mark.parametrize("workers", [2, 3, 50])
def test_batches_are_those_of_one_process(store, workers):
    shares = [Share(n, workers) for n in range(workers)]
    for most in (7, 420, 10_000):
        rows = [batch["mlp_in.1"] for batch in held_out_batches(store, ["mlp_in.1"], 128, most)]
        parts = [b["mlp_in.1"] for s in shares for b in held_out_batches(store, ["mlp_in.1"], 128, most, s)]
        assert all(map(torch.equal, rows, parts))
        assert len(rows) == len(parts)
        windows = list(held_out_windows(store, 5, most, "cpu"))
        apart = [batch for s in shares for batch in held_out_windows(store, 5, most, "cpu", s)]
        assert len(windows) == len(apart)
        for one, other in zip(windows, apart, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.keep, other.keep)


@pytest.fixture(scope="module")
def ablating(config):
    return config.override({"evaluate.ablate_features": 3})


@pytest.fixture(scope="module")
def whole(dictionary, ablating, store):
    return measure(dictionary, ablating, store)


@pytest.mark.parametrize("workers", [2, 3, 7])  # 6 batches of rows and 3 of windows: of seven workers some have none
def test_measured_apart_and_merged(dictionary, ablating, store, whole, workers):
    shares = [Share(n, workers) for n in range(workers)]
    sums = merged([measure_share(dictionary, ablating, store, "cpu", share) for share in shares])
    chosen = ablated_features(ablating, sums)
    effects = merged([ablate_share(dictionary, ablating, store, "cpu", chosen, share) for share in shares])
    found = finish(dictionary, sums, effects)
    assert len(whole.evaluation["ablated_features"]) == 3
    assert_alike(found.evaluation, whole.evaluation)
    assert_alike(found.core, whole.core)
    exact = ["group", "feature", "density", "max_activation", "site", "dead"]
    assert found.features.select(exact).equals(whole.features.select(exact))
    assert_alike(found.features.to_pylist(), whole.features.to_pylist())


def test_only_all_shares_together_can_lack_rows_or_scored_tokens(dictionary, config, store):
    few = config.override({"evaluate.tokens": 5, "evaluate.windows": 1})
    empty, full = (measure_share(dictionary, few, store, "cpu", Share(n, 2)) for n in (0, 1))
    assert (empty.metrics.tokens, full.metrics.tokens) == (0, 5)
    with pytest.raises(UserError, match=r"hold no rows"):
        finish(dictionary, empty, None)
    empty.merge(full)
    assert_alike(finish(dictionary, empty, None).evaluation, measure(dictionary, few, store).evaluation)


def test_two_models_measured_apart_and_merged(model, store, tmp_path):
    tuned = LanguageModel(Model(name=save_tuned(TINY, tmp_path / "tuned")))
    pair = ModelPair(tuned, model, {10: 11})
    dictionary = make.dictionary(wiring.model_diff("resid_post.2", 64, 64), features=48).float().eval()
    rows = [{site: torch.randn(16, 64, generator=torch.Generator().manual_seed(n)) for site in dictionary.wiring.sites}
            for n in range(5)]  # fmt: skip

    def seen(share):
        diff = ModelDiff.of(dictionary)
        evaluate_reconstruction(dictionary, rows[:2] if share.number == 0 and share.of == 2 else rows[2:], diff=diff)
        return diff, evaluate_pair(dictionary, pair, held_out_windows(store, 4, 12, "cpu", share))

    diffs, scores = zip(*(seen(Share(n, 2)) for n in (0, 1)), strict=True)
    expected = ModelDiff.of(dictionary)
    evaluate_reconstruction(dictionary, rows, diff=expected)
    sent = [diff.sums() for diff in diffs]
    assert len(pickle.dumps(sent[0])) < expected.rows[0].nbytes
    found = ModelDiff.of(dictionary)
    found.merge(merged(sent))
    assert found.active.sum() > 0
    assert_alike(found.compute(), expected.compute())
    alone = evaluate_pair(dictionary, pair, held_out_windows(store, 4, 12, "cpu", WHOLE))
    assert set(alone.compute()["models"]) == {"model", "base_model"}
    assert_alike(merged(list(scores)).compute(), alone.compute())
