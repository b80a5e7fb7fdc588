"""Grid files of SAE-Interpretability run as they are."""

from __future__ import annotations

import pytest

from tests.config.tree import ROOT
from xlc_ray.cluster.sweep import plan
from xlc_ray.config import UserError

BASES = {
    "relu": {"kind": "relu"},
    "gated": {"kind": "gated"},
    "hard_concrete": {"kind": "hard_concrete"},
    "gated_hard_concrete": {"kind": "gated_hard_concrete"},
}


@pytest.fixture
def trials(tmp_path):
    """trials(text of a grid file, kind of the base's gate, overrides) → configurations, in order."""

    def make(text, gate="relu", **changes):
        (tmp_path / "grid.yaml").write_text(text)
        given = {
            "base": str(ROOT / "configs/quickstart.yaml"),
            "out": str(tmp_path / "out"),
            "override.model.name": str(ROOT / "configs/assets/tiny-austen-gpt2"),
            "override.dictionary.gate": BASES[gate],
            "override.train.loss": {"sparsity": {"kind": "l0" if "hard" in gate else "l1", "coefficient": 1}},
            "override.text.context": 64,
            "override.train.steps": 300,
            **changes,
        }
        return [trial.config for trial in plan(str(tmp_path / "grid.yaml"), given, None, None)[1]]

    return make


def test_plural_keys_of_the_readme_are_settings_and_the_first_experiments_run(trials):
    text = """
learning_rates: [1e-4, 3e-4, 1e-3]
sparsity_coeffs: [0.01, 0.03, 0.1]
dict_size_ratios: [16.0, 32.0]
max_experiments: 6
"""
    found = trials(text)
    assert [c.train.lr for c in found] == [1e-4] * 6
    assert [c.train.loss.sparsity.coefficient for c in found] == [0.01, 0.01, 0.03, 0.03, 0.1, 0.1]
    assert [c.dictionary.features for c in found] == [16 * 128, 32 * 128] * 3


def test_samples_are_windows_and_batches_are_tokens(trials):
    text = """
gradient_accumulation_steps: [1, 4]
n_train_samples: [1000, 2000]
train_batch_size: [20]
warmup_samples: [100]
"""
    found = trials(text)
    assert [c.train.batch_tokens for c in found] == [1280, 1280, 5120, 5120]
    assert [c.train.accumulate for c in found] == [1, 1, 4, 4]
    assert [c.train.steps for c in found] == [50, 100, 12, 25]  # 12.5 rounds to even
    assert [c.train.lr_schedule.warmup for c in found] == [0.1, 0.05, 0.1, 0.05]


def test_without_samples_other_batches_see_as_many_tokens(trials):
    found = trials("train_batch_size: [16, 32]")
    assert [c.train.batch_tokens for c in found] == [1024, 2048]
    assert found[0].train.steps == 2 * found[1].train.steps


def test_specific_keys_count_for_the_gates_that_have_them(trials):
    text = """
sparsity_coeff: [0.1, 0.2]
sae_specific:
  aux_coeffs: [0.03125, 0.0625]
  initial_betas: [0.5, 1.0]
  input_dependent_gates: [true, false]
"""
    assert len(trials(text, "relu")) == 2
    assert [c.dictionary.gate.auxiliary for c in trials(text, "gated")] == [0.03125, 0.0625] * 2
    gates = [c.dictionary.gate for c in trials(text, "hard_concrete")]
    assert [(g.beta, g.input_dependent) for g in gates[:4]] == [(0.5, True), (0.5, False), (1.0, True), (1.0, False)]
    assert len(gates) == 8


def test_specific_keys_are_the_innermost_loops_wherever_they_stand(trials):
    found = trials("sae_specific: {sparsity_coeffs: [1, 2]}\nlr: [0.1, 0.2]\nseed: [3]")
    assert [(c.train.lr, c.train.loss.sparsity.coefficient) for c in found] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


def test_a_warm_up_over_the_whole_run_leaves_no_decay(trials):
    text = "n_train_samples: [5000, 10000, 50000]\nwarmup_samples: [5000]"
    found = [
        c.train.lr_schedule for c in trials(text, **{"override.train.lr_schedule": {"kind": "linear", "decay": 0.6}})
    ]
    assert [(s.warmup, s.decay) for s in found] == [(1, 0), (0.5, 0.5), (0.1, 0.6)]


def test_schedules_keep_the_warm_up_and_the_end_of_the_base(trials):
    base = {"override.train.lr_schedule": {"kind": "linear", "warmup": 0.25, "decay": 0.5, "end": 0.1}}
    linear, cosine = (c.train.lr_schedule for c in trials("lr_schedule: [linear, cosine]", **base))
    assert (linear.kind, linear.warmup, linear.decay, linear.end) == ("linear", 0.25, 0.5, 0.1)
    assert (cosine.kind, cosine.warmup, cosine.end) == ("cosine", 0.25, 0.1)
    both = "lr_schedule: [cosine, linear]\nwarmup_samples: [90]\nn_train_samples: [100]"
    cosine, linear = (c.train.lr_schedule for c in trials(both, **base))
    assert (cosine.warmup, linear.warmup, linear.decay) == (0.9, 0.9, pytest.approx(0.1))


def test_names_and_magnitudes_that_are_ours_set_nothing(trials, capsys):
    text = "sparsity_coeff: [0.1, 0.01]\nmagnitude_activation: {}\nwandb_run_name: [standard_lagrangian]"
    assert len(trials(text.format("[none]"), "hard_concrete")) == 2
    assert len(trials(text.format("[null]"), "hard_concrete")) == 2
    assert len(trials(text.format("relu"), "gated_hard_concrete")) == 2
    assert "grid.yaml: wandb_run_name sets nothing: trials are named by what differs" in capsys.readouterr().out
    assert len(trials("lr: [1]\nsae_specific: {magnitude_activation: [softplus]}")) == 1, "not of this gate"


def test_specific_keys_of_no_gate_count_for_all(trials):
    found = trials("lr: [0.1]\nsae_specific: {sparsity_coeffs: [1, 2], seeds: [1, 2], aux_coeffs: [0.1, 0.2]}")
    assert [(c.train.loss.sparsity.coefficient, c.seed) for c in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity_coef: [1]\nlr: [1]", "sparsity_coef: unknown key; did you mean sparsity_coeff?"),
        ("lr: [1]\nsae_specific: {aux_coefs: [1]}", "aux_coefs: unknown key; did you mean aux_coeffs?"),
        ("lr: [0.1]\nlearning_rates: [0.2]", "learning_rates: lr is given twice"),
        ("lr: [0.1, 0.1]", "repeats the settings"),
        ("initial_beta: [0.5]", "dictionary.gate.beta: unknown setting"),
        ("sae_specific: {initial_betas: [0.5]}", "holds no list that applies to the gate relu"),
        ("sae_specific: [1]", "sae_specific: [1] should be a mapping of lists"),
        ("sae_specific: {max_experiments: 1}", "sae_specific: max_experiments: stands beside sae_specific, not in it"),
        ("lr: []", "lr: 0 values; allowed: one or more"),
        ("n_train_samples: ['a']", "n_train_samples: 'a' is no count; allowed: whole numbers from 1"),
        ("n_train_samples: [10.5]", "n_train_samples: 10.5 is no count; allowed: whole numbers from 1"),
        ("train_batch_size: [0]", "train_batch_size: 0 is no count; allowed: whole numbers from 1"),
        ("warmup_samples: [-1]", "warmup_samples: -1 is no count; allowed: whole numbers from 0"),
        ("gradient_accumulation_steps: [true]", "True is no count; allowed: whole numbers from 1"),
        ("dict_size_ratios: [null]", "dict_size_ratios: None is no ratio; allowed: numbers above 0"),
        ("lr_schedule: [cosin]", "lr_schedule: 'cosin' is unknown; allowed: linear, cosine"),
        ("magnitude_activation: [relu]", "'relu' is not what the gate relu does; allowed there: no such key"),
        ("lr: [1]\nwandb_run_name: [a, b]", "wandb_run_name: 2 values; allowed: one"),
    ],
)
def test_mistakes_are_one_line_that_names_them(trials, text, message):
    with pytest.raises(UserError) as error:
        trials(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_magnitude_of_another_kind_is_refused(trials):
    with pytest.raises(UserError, match="'relu' is not what the gate hard_concrete does; allowed there: none"):
        trials("magnitude_activation: [none, relu]", "hard_concrete")


def test_a_grid_needs_a_base(tmp_path):
    (tmp_path / "grid.yaml").write_text("lr: [1e-4]")
    with pytest.raises(UserError, match=r"base: missing; a grid file needs --base=FILE\.yaml"):
        plan(str(tmp_path / "grid.yaml"), {"out": "x"}, None, None)
