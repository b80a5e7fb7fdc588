"""Settings of sweeps: where the base comes from, what overrides reach, and mistakes in one line."""

from __future__ import annotations

import pytest

from tests.config.tree import PRESETS, ROOT
from xlc_ray.config import UserError, load_config
from xlc_ray.config.sweep import load_sweep

TEXT = f"""
out: runs/sweep
base: {ROOT}/configs/quickstart.yaml
override: {{train.steps: 40}}
space:
  dictionary.gate.k: {{choice: [8, 16]}}
  train.lr: {{choice: [1e-3, 2e-3]}}
"""
PBT = {"pbt": {"interval": 10}, "space": {"train.lr": {"choice": [1e-3, 2e-3]}}}


@pytest.fixture
def load(tmp_path):
    """load(overrides, text) → the settings of a file."""

    def read(overrides=None, text=TEXT):
        (tmp_path / "sweep.yaml").write_text(text)
        return load_sweep(tmp_path / "sweep.yaml", overrides)

    return read


def test_the_base_is_a_file_or_the_settings_themselves(load, tmp_path):
    base = load_config(ROOT / "configs/quickstart.yaml", {"train.steps": 40})
    assert load().base == base
    (tmp_path / "base.yaml").write_text(base.yaml())
    beside = TEXT.replace(f"{ROOT}/configs/quickstart.yaml", "base.yaml")
    assert load(text=beside).base == base, "seen from the sweep's own directory"
    inline = load(text=load().yaml())
    assert inline == load()
    assert load({"base": str(ROOT / "configs/gpt2_clt.yaml")}).base.dictionary.gate.kind == "jumprelu"


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_base_may_be_a_file_on_a_preset(load, file):
    assert load({"base": str(file)}).base.override({"out": "x"}) == load_config(file, {"train.steps": 40, "out": "x"})


def test_another_preset_may_lie_under_the_base(load):
    file = ROOT / "configs/presets/gao_topk.yaml"
    found = load({"base": str(file), "base.preset": "bussmann_batchtopk", "base.out": "x"})
    assert found.base == load_config(file, {"train.steps": 40, "out": "x", "preset": "bussmann_batchtopk"})


def test_overrides_reach_the_sweep_its_base_and_single_axes(load):
    found = load({
        "search.max_concurrent": 4,
        "base.train.lr": 0.5,
        "override.train.steps": 7,
        "space.train.lr": {"choice": [1.0]},
        "space.seed": {"choice": [1, 2]},
        "asha": {"grace": 2},
    })  # fmt: skip
    assert (found.search.max_concurrent, found.base.train.lr, found.base.train.steps) == (4, 0.5, 7)
    assert list(found.space) == ["dictionary.gate.k", "train.lr", "seed"]
    assert found.space["train.lr"].choice == (1.0,)
    assert found.asha.grace == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"serach": {}}, "serach: unknown setting; did you mean search?"),
        ({"search.kind": "gird"}, "search.kind: 'gird' is unknown; did you mean grid?"),
        ({"search.kind": "random"}, "num_samples: missing; kind random needs"),
        ({"search.num_samples": 3}, "num_samples: grid runs every point once"),
        ({"base.train.lrr": 3}, "base.train.lrr: unknown setting; did you mean lr?"),
        ({"override.train.lrr": 3}, "base.train.lrr: unknown setting; did you mean lr?"),
        ({"space": {}}, "nothing varies"),
        ({"space.seed": {"choice": [1], "grid": [2]}}, "choice and grid given; give one of"),
        ({"space.seed": {}}, "nothing given; give one of choice"),
        ({"space.seed": {"choice": []}}, "space.seed.choice"),
        ({"space.seed": {"choice": [1, 2, 1]}}, "choice: 1 is given twice"),
        ({"space.seed": {"uniform": [2, 1]}}, "[2, 1] must rise"),
        ({"space.seed": {"loguniform": [0, 1]}}, "space.seed.loguniform"),
        ({"space.seed": {"randint": [0, 3]}}, "space.seed: randint has no list of values"),
        ({"space.dictionary.gate": {"choice": [1]}}, "would replace dictionary.gate.k, which stands before it"),
        ({"space.model.name": {"choice": ["a", "b"]}}, "space.model.name: decides the activations"),
        (
            {"cases": [{"train.lr": 1}, {"out": "x"}]},
            "cases.1.out: decides the activations, which all trials share, or",
        ),
        ({"cases": [{"text.context": 8}]}, "cases.0.text.context: decides the activations"),
        ({"cases": [{"generate": {}}]}, "cases.0.generate: decides the activations"),
        ({"cases": [{"train.loss.auxk": {}, "train.loss": {}}]}, "cases.0.train.loss: would replace train.loss.auxk"),
        ({"space.seed": {"choice": [1], "when": {"train.lr": 1}}}, None),
        (
            {"space.dictionary.gate.k": {"choice": [1], "when": {"train.lr": 1}}},
            "train.lr is set by train.lr, which must",
        ),
        (
            {"space.seed": {"choice": [1], "when": {"dictionary.gate.kid": "topk"}}},
            "space.seed.when: dictionary.gate.kid: unknown setting; did you mean k",
        ),
        ({"space.seed": {"choice": [1], "when": {"dictionary.gate.options.any": 1}}}, None),
        ({"asha": {"grace": 3, "rungs": [4]}}, "rungs = [4] must rise, and begin with grace = 3"),
        ({"asha": {"grace": 40}}, "asha: a rung at 40 is not before train.steps = 40; use less"),
        ({"asha": {"grace": 3, "rungs": [3, 50]}}, "asha: a rung at 50 is not before train.steps = 40; use less"),
        ({"asha": {"grace": 3, "rungs": [3, 39]}}, None),
        ({"asha": {"grace": 3}, "space.train.steps": {"choice": [1, 2]}}, "rungs compare trials of equal length"),
        ({"share_activations": True, "search": {"kind": "optuna", "num_samples": 2}}, "optuna chooses trials by what"),
        ({"resources.sharing": 2}, "resources.sharing: does nothing without share_activations: true"),
        ({**PBT, "asha": {"grace": 3}}, "pbt: replaces trials where asha ends them; give one of the two"),
        ({**PBT, "search": {"kind": "optuna", "num_samples": 4}}, "search.kind: pbt wants its population at once"),
        ({**PBT, "cases": [{"train.lr": 1}]}, "cases: pbt changes axes by themselves"),
        (
            {**PBT, "space.dictionary.gate.k": {"choice": [8, 9]}},
            "space.dictionary.gate.k: cannot change while a trial",
        ),
        ({**PBT, "space.seed": {"choice": [1, 2]}}, "as pbt does; allowed: train.lr, train.lr_schedule, "),
        ({**PBT, "space.train.loss": {"choice": [{}]}}, None),
        ({**PBT, "space.train.losses": {"choice": [{}]}}, "space.train.losses: cannot change"),
        ({**PBT, "pbt.interval": 40}, "pbt.interval: 40 leaves no comparison before train.steps = 40; use less"),
        ({**PBT, "pbt.quantile": 0.6}, "pbt.quantile"),
        ({"base": "/nowhere.yaml"}, "/nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_line_that_names_them(load, overrides, message):
    if message is None:
        load(overrides)
        return
    with pytest.raises(UserError) as error:
        load(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
