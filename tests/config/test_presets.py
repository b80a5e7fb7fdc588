"""Presets: what each source decides, and how they lie under a file and its overrides."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

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

# By hand, from the papers and programs; their own units in comments where ours differ.
OF_ALL = {"seed": 0, "train.optimizer.betas": (0.9, 0.999), "train.loss.scale": "canonical"}
OF_SAES = {"dictionary.wiring.kind": "sae", "dictionary.tie_encoder_init": True}
L1_OF_APRIL = {
    **OF_SAES,
    "dictionary.gate.kind": "relu",
    "dictionary.normalization.kind": "mean_norm",  # E|x| = sqrt(n)
    "dictionary.decoder_norm": 0.1,
    "dictionary.bias_init": "zeros",
    "dictionary.unit_norm": False,
    "train.lr": 5e-5,
    "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 0.2, "end": 0},
    "train.clip_norm": 1,
    "train.loss.sparsity.kind": "l1",
    "train.loss.sparsity.coefficient": 5,
    "train.loss.sparsity.decoder_norm": True,
    "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 0.05},
}
EXPECTED = {
    "anthropic_clt": {
        "dictionary.wiring.kind": "clt",
        "dictionary.gate": {"kind": "jumprelu", "threshold": 0.1, "bandwidth": 2, "parameterisation": "log"},
        "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 0.2, "end": 0},
        "train.loss.sparsity.kind": "tanh",
        "train.loss.sparsity.c": 4,
        "train.loss.sparsity.coefficient": 10,
        "train.loss.sparsity.decoder_norm": True,
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 1},
        "train.loss.preactivation": 3e-6,
    },
    "anthropic_april24": L1_OF_APRIL | {"dictionary.wiring.site": "resid_post"},
    "rajamanoharan": OF_SAES
    | {
        "dictionary.gate": {"kind": "jumprelu", "threshold": 1e-3, "bandwidth": 1e-3, "parameterisation": "direct"},
        "dictionary.normalization.kind": "unit",
        "dictionary.unit_norm": True,
        "train.lr": 7e-5,
        "train.batch_tokens": 4096,
        "train.optimizer.betas": (0, 0.999),
        "train.loss.sparsity.kind": "l0",
        "train.loss.sparsity.target_l0": None,
    },
    "gao_topk": OF_SAES
    | {
        "dictionary.gate.kind": "topk",
        "dictionary.gate.k": 32,
        "dictionary.gate.rank_by": "activation",
        "dictionary.bias_init": "geometric_median",
        "dictionary.unit_norm": True,
        "train.batch_tokens": 131072,
        "train.lr": 1e-4,
        "train.lr_schedule": {"kind": "constant", "warmup": 0},
        "train.optimizer.eps": 6.25e-10,
        "train.clip_norm": None,
        "train.dead_after_tokens": 10_000_000,
        "train.loss.auxk": {"coefficient": 1 / 32, "k": None},
        "train.loss.sparsity": None,
    },
    "bussmann_batchtopk": OF_SAES
    | {
        "dictionary.wiring.site": "resid_pre",
        "dictionary.gate.kind": "batchtopk",
        "dictionary.gate.k": 32,
        "dictionary.unit_norm": True,
        "train.batch_tokens": 4096,
        "train.lr": 3e-4,
        "train.optimizer.betas": (0.9, 0.99),
        "train.dead_after_tokens": 5 * 4096,
        "train.loss.scale": "per_dim",
        "train.loss.auxk": {"coefficient": 1 / 32, "k": 512},
        "train.loss.sparsity": None,
    },
    "gated": OF_SAES
    | {
        "dictionary.gate": {"kind": "gated", "auxiliary": 1},
        "dictionary.unit_norm": True,
        "train.lr": 3e-4,
        "train.batch_tokens": 4096,
        "train.optimizer.betas": (0, 0.999),
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.decoder_norm": False,
    },
    "crosslayer_coding": {
        "dictionary.wiring.kind": "clt",
        "dictionary.wiring.tied": None,
        "dictionary.gate": {"kind": "jumprelu", "threshold": 0.03, "bandwidth": 1, "parameterisation": "crosslayer"},
        "dictionary.normalization.kind": "mean_std",
        "train.batch_tokens": 4096,
        "train.lr": 3e-4,
        "train.lr_schedule": {"kind": "linear", "warmup": 0, "decay": 1, "end": 0.1},
        "train.optimizer.kind": "adamw",
        "train.optimizer.weight_decay": 0.01,
        "train.clip_norm": None,
        "train.loss.scale": "per_dim",
        "train.loss.sparsity.kind": "tanh",
        "train.loss.sparsity.c": 1,
        "train.loss.sparsity.coefficient": pytest.approx(1e-3 * 4096),  # summed over the tokens of a batch
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 1},
        "train.dead_after_tokens": 1000 * 4096,
    },
    "sae_interpretability": {
        "dictionary.wiring.kind": "sae",
        "dictionary.gate.kind": "hard_concrete",
        "dictionary.gate.input_dependent": True,
        "dictionary.gate.beta": 0.5,
        "dictionary.gate.gamma": -0.1,
        "dictionary.gate.zeta": 1.1,
        "dictionary.normalization.kind": "none",
        "dictionary.unit_norm": True,
        "train.batch_tokens": 4 * 5 * 1024,
        "train.lr": 1e-3,
        "train.lr_schedule": {"kind": "cosine", "warmup": 20_000 / 400_000, "cycles": 1, "end": 0.1},
        "train.clip_norm": 64,  # 1 on a loss divided by the width 64
        "train.loss.sparsity.kind": "l0",
        "train.loss.sparsity.coefficient": 0.1,
    },
    "transcoder_circuits": {
        "dictionary.wiring": {"kind": "transcoder", "layers": "all", "skip": False},
        "dictionary.gate.kind": "relu",
        "dictionary.unit_norm": True,
        "dictionary.tie_encoder_init": False,
        "train.batch_tokens": 4096,
        "train.lr": 4e-4,
        "train.lr_schedule": {"kind": "constant", "warmup": pytest.approx(5000 * 4096 / 60e6, rel=0.01)},
        "train.dead_after_tokens": 5000 * 4096,
        "train.loss.scale": "per_dim",
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.coefficient": pytest.approx(1.4e-4 * 768**0.5, rel=0.01),
        "train.loss.sparsity.decoder_norm": False,
        "train.loss.ghost": {"coefficient": 1},
    },
    "acausal_crosscoder": {
        "dictionary.wiring": {"kind": "crosscoder", "site": "resid_post", "layers": "all", "causality": "acausal"},
        "dictionary.gate.kind": "relu",
        "dictionary.normalization.kind": "mean_norm",
        "dictionary.decoder_norm": pytest.approx(0.005 * 12**0.5, rel=0.01),  # 0.005 a layer
        "dictionary.tie_encoder_init": True,
        "dictionary.unit_norm": False,
        "train.batch_tokens": 2048,
        "train.lr": 2e-5,
        "train.lr_schedule": {"kind": "linear", "warmup": 0.05, "decay": 0.2, "end": 0},
        "train.clip_norm": 1,
        "train.loss.sparsity.kind": "l1",
        "train.loss.sparsity.coefficient": pytest.approx(2 * 12**0.5, rel=0.01),  # 2 x the sum of layers' norms
        "train.loss.sparsity.schedule": {"kind": "constant", "warmup": 0.05},
    },
    "sae_factory": L1_OF_APRIL
    | {
        "dictionary.wiring.site": "mlp_out",
        "train.batch_tokens": 4096,
        "train.dead_after_tokens": 1000 * 4096,
    },
}


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
