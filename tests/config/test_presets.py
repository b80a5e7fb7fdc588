"""Presets: what each source decides, and how they lie under a file and its overrides."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from tests.config.sources import EXPECTED, OF_ALL
from tests.config.tree import PRESETS, ROOT, walk
from xlc_ray.config import UserError, load_config, load_config_text, presets, yaml_text

SCHEMA = json.loads((ROOT / "configs/schema.json").read_text())
BARE = """
out: runs/x
model: {name: m}
text: {dataset: d}
generate: {tokens: 1, held_out_tokens: 1}
source: {path: s}
dictionary: {features: 8192}
train: {steps: 10, batch_tokens: 64}
"""

SIZES = {"dictionary.features", "dictionary.wiring.layers", "dictionary.gate.k"}
SIZES |= {f"train.{name}" for name in ("steps", "batch_tokens", "lr", "dead_after_tokens", "loss.sparsity.coefficient")}
SIZES |= {f"dictionary.gate.threshold_{name}" for name in ("start", "decay")} | {"train.loss.auxk.k"}
"""What a small model and a short run change."""


def config_of(text: str, overrides: dict | None = None):
    return load_config_text(text.encode(), "file", overrides)


def at(tree: dict, path: str):
    for key in path.split("."):
        tree = tree[key]
    return tree


def test_there_are_those_promised_each_with_a_file_and_a_row_in_the_readme():
    assert presets.names() == sorted(EXPECTED) == sorted(file.stem for file in PRESETS)
    rows = re.findall(r"^\| `(\w+)` \| \[", (ROOT / "README.md").read_text(), re.M)
    assert sorted(rows) == presets.names()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_its_source_says(name):
    wanted = {**OF_ALL, **EXPECTED[name]}
    text = BARE.replace(", batch_tokens: 64", "") if "train.batch_tokens" in wanted else BARE
    found = config_of(f"preset: {name}\n{text}").model_dump()
    assert {path: at(found, path) for path in wanted} == wanted


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_speaks_of_dictionary_and_training_alone_and_names_its_kinds(name):
    tree = presets.settings_of(name, "here")
    assert set(tree) == {"dictionary", "train"}
    assert not {"features"} & set(tree["dictionary"])
    assert not {"steps", "precision", "log_every"} & set(tree["train"])
    for path, section, field, _ in walk():  # a file that names another kind must find one to differ from
        owner, _, last = path.rpartition(".")
        if last == "kind" and owner.split(".")[0] in tree and field in section.model_fields:
            node = tree
            for key in owner.split("."):
                node = node.get(key) if isinstance(node, dict) else None
            assert node is None or "kind" in node, owner


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_the_file_of_a_preset_names_it_and_leaves_what_it_decides(file):
    text = file.read_bytes()
    assert text.startswith(b"# yaml-language-server: $schema=../schema.json\n")
    tree = yaml_text.parse_mapping(text, str(file))
    assert tree["preset"] == file.stem
    jsonschema.validate(tree, SCHEMA)
    config = load_config(file)
    assert load_config_text(config.yaml().encode(), "again") == config
    own = {path for part in ("dictionary", "train") for path in leaves_of(tree[part], part)}
    assert own <= SIZES, "what the source decides stands in the preset"


def leaves_of(tree: dict, path: str) -> list[str]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (leaves_of(value, f"{path}.{key}") if isinstance(value, dict) else [f"{path}.{key}"])
    ]


# ---------------------------------------------------------------- under a file, under overrides


def test_the_file_goes_first_and_overrides_before_both():
    text = BARE.replace("train: {", "train: {lr: 1e-3, ")
    assert config_of(f"preset: gao_topk\n{BARE}").train.lr == 1e-4
    assert config_of(f"preset: gao_topk\n{text}").train.lr == 1e-3
    assert config_of(f"preset: gao_topk\n{text}", {"train.lr": 2e-3}).train.lr == 2e-3


@pytest.mark.parametrize("kind", ["", "kind: topk, "])
def test_a_section_of_the_same_or_no_kind_is_merged_key_by_key(kind):
    text = BARE.replace("features: 8192", f"features: 8192, gate: {{{kind}k: 5}}, wiring: {{layers: [3]}}")
    config = config_of(f"preset: gao_topk\n{text}")
    assert (config.dictionary.gate.kind, config.dictionary.gate.k) == ("topk", 5)
    assert (config.dictionary.wiring.site, config.dictionary.wiring.layers) == ("resid_post", (3,))
    assert config.train.loss.auxk.coefficient == 1 / 32


def test_a_section_of_another_kind_replaces_the_presets_whole():
    text = BARE.replace("steps: 10", "steps: 10, loss: {auxk: null}, optimizer: {kind: adamw}")
    text = text.replace("features: 8192", "features: 8192, gate: {kind: relu}")
    config = config_of(f"preset: gao_topk\n{text}")
    assert config.dictionary.gate.model_dump() == {"kind": "relu"}
    assert config.train.loss.auxk is None
    assert config.train.optimizer.eps == 1e-8  # the default, not the preset's


def test_an_override_replaces_a_presets_section_as_it_does_a_files():
    gate = config_of(
        f"preset: bussmann_batchtopk\n{BARE}", {"dictionary.gate": {"kind": "topk", "k": 3}}
    ).dictionary.gate
    assert (gate.kind, gate.k, gate.threshold_start) == ("topk", 3, 100)


def test_the_name_can_be_an_override_and_null_is_none():
    assert config_of(BARE, {"preset": "gated"}).dictionary.gate.kind == "gated"
    assert config_of(f"preset: gated\n{BARE}", {"preset": "gao_topk"}).dictionary.gate.kind == "topk"
    with pytest.raises(UserError, match=r"file: dictionary\.wiring: missing"):
        config_of(f"preset: gated\n{BARE}", {"preset": None})


def test_what_was_resolved_is_read_back_without_a_preset_and_takes_none():
    config = config_of(f"preset: rajamanoharan\n{BARE}", {"train.lr": 1e-3})
    assert "preset" not in yaml_text.parse_mapping(config.yaml().encode(), "x")
    assert config_of(config.yaml()) == config
    with pytest.raises(UserError, match="again: preset: gao_topk decides nothing, because the file gives each"):
        load_config_text(config.yaml().encode(), "again", {"preset": "gao_topk"})
    with pytest.raises(UserError, match="override: preset: lies under a file as it is read"):
        config.override({"preset": "gao_topk"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "preset: goa_topk",
            "file: preset: 'goa_topk' is unknown; did you mean gao_topk? allowed: acausal_crosscoder, ",
        ),
        ("preset: [gated]", r"file: preset: \['gated'\] is unknown; .*allowed: "),
        ("preset: ../gated", "file: preset: '../gated' is unknown; did you mean gated"),
        ("preset: true", "file: preset: True is unknown; "),
    ],
)
def test_a_name_that_is_none_is_one_line_with_the_nearest(line, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        config_of(f"{line}\n{BARE}")
    assert len(str(error.value).splitlines()) == 1


def test_losses_that_do_not_fit_a_changed_gate_are_named():
    text = BARE.replace("features: 8192", "features: 8192, gate: {kind: relu}")
    with pytest.raises(UserError, match=r"file: train\.loss\.sparsity\.kind: l0 needs the gate jumprelu"):
        config_of(f"preset: rajamanoharan\n{text}")


# ---------------------------------------------------------------- for editors


def test_editors_take_parts_of_sections_under_a_preset_and_want_them_whole_without():
    tree = yaml_text.parse_mapping(BARE.encode(), "x")
    partial = tree | {"preset": "gao_topk", "dictionary": {"features": 9, "gate": {"k": 5}}}
    jsonschema.validate(partial, SCHEMA)
    for wrong in (
        tree,
        tree | {"preset": None},
        partial | {"preset": "goa_topk"},
        partial | {"dictionary": {"featurs": 9}},
        partial | {"dictionary": {"gate": {"q": 5}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)
