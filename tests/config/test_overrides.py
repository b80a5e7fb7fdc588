"""An override is (dotted path, value) and replaces what is at that path."""

from __future__ import annotations

import re

import pytest

from tests.config.tree import ROOT
from xlc_ray.config import UserError, apply_overrides, load_config, load_config_text

QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.fixture
def config():
    return load_config(QUICKSTART)


def changed_paths(old, new, path=""):
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old | new
        return {p for key in keys for p in changed_paths(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))}
    return set() if old == new else {path}


def test_an_override_changes_its_path_and_nothing_else(config):
    found = config.override({"train.lr": 5e-4})
    assert found.train.lr == 5e-4
    assert changed_paths(config.model_dump(), found.model_dump()) == {"train.lr"}


def test_a_mapping_replaces_the_whole_mapping(config):
    assert config.dictionary.gate.threshold_start != 1000
    gate = config.override({"dictionary.gate": {"kind": "batchtopk", "k": 8}}).dictionary.gate
    assert (gate.k, gate.threshold_start) == (8, 1000)  # the default, not what the file said


def test_a_kind_can_change_with_its_settings(config):
    assert config.override({"dictionary.gate": {"kind": "relu"}}).dictionary.gate.model_dump() == {"kind": "relu"}


@pytest.mark.parametrize("start", ["absent", "null"])
def test_missing_sections_are_made(start):
    text = QUICKSTART.read_bytes() + (b"" if start == "absent" else b"evaluate: {}\n")
    overrides = {} if start == "absent" else {"train.wandb": None}
    config = load_config_text(text, "file", {**overrides, "train.wandb.project": "p", "evaluate.windows": 3})
    assert config.train.wandb.project == "p"
    assert config.evaluate.windows == 3


def test_later_overrides_go_on_from_earlier_ones_and_leave_the_callers_values_alone(config):
    gate = {"kind": "topk", "k": 4}
    found = config.override({"dictionary.gate": gate, "dictionary.gate.k": 5})
    assert found.dictionary.gate.k == 5
    assert gate == {"kind": "topk", "k": 4}


def test_the_tree_given_is_left_alone():
    tree = {"a": {"b": [1]}}
    assert apply_overrides(tree, {"a.b": 2, "c.d": 3}) == {"a": {"b": 2}, "c": {"d": 3}}
    assert tree == {"a": {"b": [1]}}


def test_an_alias_in_yaml_is_a_value_of_its_own():
    text = QUICKSTART.read_text().replace("  lr: 2e-3\n", "  lr: 2e-3\n  lr_schedule: &s {kind: linear, decay: 0.5}\n")
    text = text.replace("    auxk: {}\n", "    auxk: {}\n    sparsity: {kind: l1, coefficient: 1, schedule: *s}\n")
    config = load_config_text(text.encode(), "file", {"train.lr_schedule.decay": 0.1})
    assert (config.train.lr_schedule.decay, config.train.loss.sparsity.schedule.decay) == (0.1, 0.5)


def test_a_path_through_a_value_is_a_mistake(config):
    with pytest.raises(UserError, match=r"train.lr.x: lr is 0.002, which has no settings inside"):
        config.override({"train.lr.x": 1})


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "0.0003", "3.0e-4", ".3e-3", "'3e-4'"])
def test_numbers_in_files_are_numbers_however_they_are_written(number):
    text = QUICKSTART.read_text().replace("lr: 2e-3", f"lr: {number}")
    assert load_config_text(text.encode(), "file").train.lr == 3e-4


def test_counts_may_have_an_exponent():
    text = re.sub(r"steps: \d+", "steps: 1e4", QUICKSTART.read_text())
    assert load_config_text(text.encode(), "file").train.steps == 10_000


@pytest.mark.parametrize("name", ["3e-4", "1e5", "null", "yes", "a: b", "ä'\"", "2024-01-01", " x "])
def test_words_that_look_like_something_else_survive_the_round_trip(config, name):
    found = config.override({"out": name})
    assert load_config_text(found.yaml().encode(), "again") == found
    assert found.out == name


def test_numbers_survive_the_round_trip_exactly(config):
    found = config.override({"train.lr": 1 / 3e7, "train.optimizer.eps": 1e-300, "train.loss.auxk.coefficient": 1e22})
    assert load_config_text(found.yaml().encode(), "again") == found
