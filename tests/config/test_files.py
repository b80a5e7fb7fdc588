"""The files in configs/: each loads, survives a round trip, and agrees with the schema that editors use."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.config.tree import FILES, PRESETS, ROOT, SWEEPS, everything
from xlc_ray.activations import sites
from xlc_ray.config import load_config, load_config_text, schema, yaml_text
from xlc_ray.config.sweep import load_sweep, sweep_of
from xlc_ray.dictionary.build import make_wiring
from xlc_ray.sweeps import space

REQUIRED = {"quickstart", "gpt2_clt", "gpt2_sae", "gpt2_transcoders", "gpt2_crosscoder", "gemma2_2b_clt"}
SHAPES = {
    "gpt2": (12, 768),
    "gemma2": (26, 2304),
    "pythia": (6, 512),
    "qwen3": (28, 1024),
    "quickstart": (4, 128),
    "tiny_model_diff": (4, 128),
    "tiny_end_to_end": (4, 64),
}

files = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_the_promised_files_are_there():
    assert {file.stem for file in FILES} >= REQUIRED


@files
def test_file_loads_and_its_yaml_is_the_same_settings(file):
    config = load_config(file)
    assert load_config_text(config.yaml().encode(), "again") == config


@files
def test_file_names_the_schema_and_follows_it(file):
    text = file.read_bytes()
    assert text.startswith(b"# yaml-language-server: $schema=schema.json\n")
    tree = yaml_text.parse_mapping(text, str(file))
    jsonschema.validate(tree, json.loads((ROOT / "configs/schema.json").read_text()))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_sweep_follows_its_schema_and_all_its_trials_fit(file):
    text = file.read_bytes()
    assert text.startswith(b"# yaml-language-server: $schema=schema.json\n")
    tree = yaml_text.parse_mapping(text, str(file))
    jsonschema.validate(tree, json.loads((ROOT / "configs/sweeps/schema.json").read_text()))
    sweep = load_sweep(file)
    again = sweep_of(yaml_text.parse_mapping(sweep.yaml().encode(), "again"), "again")
    assert again == sweep
    assert len(space.trials(sweep)) == (sweep.search.num_samples or 12)


@files
def test_file_means_the_same_to_editors_which_read_yaml_1_2(file):
    # There 400_000 is a word and 010 is ten: such numbers would be underlined, or read otherwise.
    plain = [line.split("#")[0] for line in file.read_text().splitlines()]
    words = [word.strip("{}[],") for line in plain for word in line.split()]
    assert [word for word in words if word[:1].isdigit() and ("_" in word or (word[0] == "0" and word.isdigit()))] in (
        [],
        ["0"],
    )


@files
def test_wiring_fits_the_model(file):
    config = load_config(file)
    layers, width = next(shape for name, shape in SHAPES.items() if file.stem.startswith(name))
    wiring = make_wiring(config.dictionary.wiring, layers, width)
    assert all(sites.parse(site)[1] < layers for site in wiring.sites)
    written = config.generate.tokens / config.train.batch_tokens
    assert config.train.steps >= written, "stores more than it trains on"


def test_a_store_that_files_share_is_the_same_store():
    stores: dict[str, dict[str, object]] = {}
    for file in [*FILES, *PRESETS]:
        config = load_config(file)
        name = "quickstart" if file in PRESETS else file.stem
        layers, width = next(shape for model, shape in SHAPES.items() if name.startswith(model))
        sites = config.generate.sites or make_wiring(config.dictionary.wiring, layers, width).sites
        made = (config.model, config.text, config.generate.model_copy(update={"sites": sorted(sites)}), config.seed)
        stores.setdefault(config.source.path, {})[file.stem] = made
    shared = {path: files for path, files in stores.items() if len(files) > 1}
    assert set(shared) == {"data/gpt2_mlp", "data/quickstart", "data/tiny_resid"}
    for path, files in shared.items():
        assert [stem for stem, made in files.items() if made != next(iter(files.values()))] == [], path


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_the_store_of_a_preset_has_its_sites(file):
    config = load_config(file)
    wiring = make_wiring(config.dictionary.wiring, 4, 128)
    assert set(wiring.sites) <= set(config.generate.sites or wiring.sites)


def test_schema_is_current():
    assert (ROOT / "configs/schema.json").read_text() == schema.text(), "run `make schema`"
    assert (ROOT / "configs/sweeps/schema.json").read_text() == schema.sweep_text(), "run `make schema`"


def test_every_setting_explains_itself():
    assert [path for path, _, _, field in everything() if not field.description] == []
