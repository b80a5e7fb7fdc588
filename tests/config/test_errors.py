"""A mistake in the settings is one line: where, what, and what is allowed. Never another exception."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.tree import ROOT, sections_of, walk
from xlc_ray.config import Config, UserError, load_config, load_config_text

QUICKSTART = ROOT / "configs/quickstart.yaml"
TEXT = QUICKSTART.read_text()
BASE = load_config(QUICKSTART)

BASED = ("base_model", {"name": "base", "replace_tokens": [["<turn>", 3]]})

# One valid form of each section that quickstart lacks, or has in another kind: (overrides, path).
FORMS = [
    *((("dictionary.wiring", {"kind": kind}),) for kind in ("sae", "transcoder", "clt", "crosscoder")),
    (BASED, ("dictionary.wiring", {"kind": "model_diff", "layer": 0})),
    (("dictionary.wiring", {"kind": "model_diff", "layer": 0}), BASED),
    (("dictionary.wiring", {"kind": "custom", "path": "mine:wires", "options": {"reach": 2}}),),
    (("dictionary.gate", {"kind": "custom", "path": "mine:Gate"}),),
    *(
        (("train.loss.auxk", None), ("dictionary.gate", {"kind": kind}))
        for kind in ("gated", "hard_concrete", "gated_hard_concrete")
    ),
    (("train.loss.matryoshka", {"prefixes": [0.25, 1]}),),
    *((("dictionary.gate", {"kind": kind}),) for kind in ("relu", "jumprelu")),
    *((("dictionary.gate", {"kind": kind, "k": 4}),) for kind in ("topk", "batchtopk")),
    *((("train.lr_schedule", {"kind": kind}),) for kind in ("constant", "linear", "cosine")),
    (("train.loss.sparsity", {"kind": "l1", "coefficient": 1.0}),),
    (("train.loss.sparsity", {"kind": "l1", "coefficient": 1.0}), ("train.loss.sparsity.schedule", {"kind": "linear"})),
    (("train.wandb", {"project": "p"}),),
    *(((section, getattr(BASE, section).model_dump(mode="json")),) for section in ("model", "text", "generate")),
    *(((section, getattr(BASE, section).model_dump(mode="json")),) for section in ("source", "evaluate", "cluster")),
    (("dictionary.normalization", {}),),
    (("source", {"kind": "http", "url": "http://host:1", "dataset_id": "a/b"}),),
    (("source", {"kind": "live", "tee": "data/kept"}),),
    (("source.cache", {"path": "/tmp/cache"}),),
    (("train.optimizer", {}),),
    (("train.loss.auxk", {}),),
    (("train.loss.auxk", None), ("train.loss.ghost", {})),
    (("train.loss.connection", {"run": "runs/sae", "coefficient": 1.0}),),
    (("train.resample", {"every": 100, "tokens": 1000}),),
    (("train.loss", {}),),
    (("dictionary.wiring", {"kind": "sae"}), ("train.end_to_end", {})),
    (("train", BASE.train.model_dump(mode="json")),),
    (("dictionary", BASE.dictionary.model_dump(mode="json")),),
]


def message_of(overrides: dict) -> str:
    with pytest.raises(UserError) as error:
        BASE.override(overrides)
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert "[type=" not in line, "pydantic's own wording"
    return line.removeprefix("override: ")


def test_the_forms_below_cover_every_section():
    found = {path for path, _, _, field in walk() if sections_of(field.annotation)}
    assert found == {form[-1][0] for form in FORMS} | {"text.mixture"}  # a list: the test below


def test_an_unknown_key_in_a_list_names_its_place_and_the_nearest():
    parts = [{"dataset": "a"}, {"dataset": "b", "wieght": 2}]
    line = message_of({"text.dataset": None, "text.mixture": parts})
    assert line.startswith("text.mixture.1.wieght: unknown setting; did you mean weight? allowed: column, dataset, ")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[-1][0]}-{form[-1][1].get('kind', '')}")
def test_an_unknown_key_fails_at_every_level_and_names_the_nearest(form):
    overrides, path = dict(form), form[-1][0]
    BASE.override(overrides)  # valid so far
    node = BASE.override(overrides)
    for name in path.split("."):
        node = getattr(node, name)
    for name in type(node).model_fields:
        line = message_of({**overrides, f"{path}.{name}x": 1})
        assert line.startswith(f"{path}.{name}x: unknown setting; did you mean {name}? allowed: ")


def test_an_unknown_key_at_the_top_fails():
    assert message_of({"trian": 1}).startswith("trian: unknown setting; did you mean train? allowed: base_model, ")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"train.lr": "x"}, "train.lr: 'x' should be a valid number"),
        ({"train.lr": 0}, "train.lr: 0 should be greater than 0"),
        ({"train.lr": float("inf")}, "train.lr: inf should be a finite number"),
        ({"train.lr": float("nan")}, "train.lr: nan should be a finite number"),
        ({"train.steps": 1.5}, "train.steps: 1.5 should be a valid integer"),
        ({"train.steps": True}, "train: steps = true is a truth value"),
        ({"train.steps": 0}, "train.steps: 0 should be greater than or equal to 1"),
        ({"generate.tokens": 0}, "generate.tokens: 0 should be greater than or equal to 1"),
        ({"train.steps": None}, "train.steps: None should be a valid integer"),
        ({"train": None}, "train: None should be a mapping of settings"),
        (
            {"dictionary.gate": "topk"},
            "dictionary.gate: 'topk' should be a mapping with kind: batchtopk, custom, gated, ",
        ),
        ({"dictionary.gate": {"k": 3}}, "dictionary.gate.kind: missing; allowed: batchtopk, custom, gated, "),
        ({"dictionary.gate.kind": "topkk"}, "dictionary.gate.kind: 'topkk' is unknown; did you mean topk? allowed: "),
        ({"dictionary.gate": {"kind": "topk"}}, "dictionary.gate.k: missing"),
        ({"dictionary.gate": {"kind": "topk", "k": 1, "topk": 1}}, "dictionary.gate.topk: unknown setting; "),
        ({"dictionary.gate": {"kind": "topk", "k": 1, "a[b]": 1}}, "dictionary.gate.a[b]: unknown setting; "),
        ({"model.dtype": "bfloat"}, "model.dtype: 'bfloat' is unknown; did you mean bfloat16? allowed: "),
        ({"dictionary.wiring.layers": "al"}, "dictionary.wiring.layers: 'al' should be all, or a list of layers"),
        ({"dictionary.wiring.layers": [0, -1]}, "dictionary.wiring.layers: [0, -1] should be all, or a list"),
        ({"dictionary.wiring.layers": []}, "dictionary.wiring.layers: [] should be all, or a list"),
        ({"train.optimizer.betas": [0.9, 1]}, "train.optimizer.betas.1: 1 should be less than 1"),
        ({"out": ""}, "out: '': string should have at least 1 character"),
        ({"seed": -1}, "seed: -1 should be greater than or equal to 0"),
        ({"text.ignore_first": 128}, "text: ignore_first = 128 leaves nothing of windows of 128 tokens"),
        ({"text.dataset": None}, "text: give either dataset or mixture, a list of {dataset, subset, split"),
        ({"text.mixture": [{"dataset": "b"}]}, "text: give either dataset or mixture"),
        ({"text.dataset": None, "text.mixture": []}, "text.mixture: []"),
        ({"text.dataset": None, "text.mixture": [{"dataset": "b", "weight": 0}]}, "text.mixture.0.weight: 0 should be"),
        (
            {"text.dataset": None, "text.mixture": [{"dataset": "b"}], "text.column": "body"},
            "text: column does not apply to a mixture; give it with each dataset",
        ),
        ({"text.windows": "pack"}, "text.windows: 'pack' is unknown; did you mean packed? allowed: one_per_document, "),
        (
            {"train.lr_schedule": {"kind": "linear", "warmup": 0.5, "decay": 0.6}},
            "train.lr_schedule: warmup = 0.5 and decay = 0.6 exceed the whole run, 1",
        ),
        ({"dictionary.gate.k": 2000, "dictionary.gate.pool": "group"}, "dictionary.gate.k: 2000 exceeds"),
        (
            {"cluster.tensor_parallel": 2000},
            "cluster.tensor_parallel: 2000 ranks cannot share dictionary.features = 1024",
        ),
        ({"cluster.replicas": 3}, "train.batch_tokens: 1024 is not divisible by replicas x accumulate = 3"),
        (
            {"train.loss.sparsity": {"kind": "l0", "coefficient": 1}},
            "train.loss.sparsity.kind: l0 needs the gate jumprelu, hard_concrete or gated_hard_concrete, not batchtopk",
        ),
        (
            {"dictionary.gate": {"kind": "gated"}},
            "train.loss.auxk: needs the gate relu, jumprelu, topk, batchtopk or custom, not gated",
        ),
        (
            {"dictionary.gate": {"kind": "gated"}, "train.loss": {"ghost": {}}},
            "train.loss.ghost: needs the gate relu, jumprelu, topk, batchtopk or custom, not gated",
        ),
        (
            {
                "dictionary.gate": {"kind": "hard_concrete"},
                "train.loss": {"sparsity": {"kind": "l1", "coefficient": 1}},
            },
            "train.loss.sparsity.kind: the gate hard_concrete is penalised by l0, not by l1",
        ),
        (
            {
                "dictionary.gate": {"kind": "jumprelu"},
                "train.loss": {"sparsity": {"kind": "lp", "coefficient": 1}},
            },
            "train.loss.sparsity.kind: lp is infinitely steep at 0, where the threshold of jumprelu learns",
        ),
        (
            {
                "dictionary.wiring": {"kind": "sae", "site": "resid_post"},
                "train.loss": {"matryoshka": {"prefixes": [0.5, 1]}},
                "train.end_to_end": {"kl": 1.0},
            },
            "train.loss.matryoshka: prefixes count by train.end_to_end.reconstruction, which is 0; allowed: more",
        ),
        (
            {"dictionary.unit_norm": True, "dictionary.decoder_norm": 0.5},
            "dictionary.decoder_norm: has no effect with unit_norm: true; leave one of the two out",
        ),
        (
            {"dictionary.gate": {"kind": "gated_hard_concrete"}, "train.loss": {"preactivation": 1}},
            "train.loss.preactivation: the gate gated_hard_concrete has no threshold",
        ),
        (
            {"dictionary.gate.rank_by": "zscore", "train.loss.sparsity": {"kind": "lp", "coefficient": 1}},
            "train.loss.sparsity.kind: lp needs features that are not negative",
        ),
        (
            {"dictionary.gate": {"kind": "gated", "auxiliary": 0}},
            "dictionary.gate.auxiliary: 0 should be greater than 0",
        ),
        (
            {"dictionary.gate": {"kind": "hard_concrete", "gamma": 0.1}},
            "dictionary.gate.gamma: 0.1 should be less than 0",
        ),
        ({"dictionary.gate": {"kind": "hard_concrete", "zeta": 1}}, "dictionary.gate.zeta: 1 should be greater than 1"),
        ({"dictionary.gate": {"kind": "custom", "path": "mine.Gate"}}, "dictionary.gate.path: 'mine.Gate': "),
        (
            {"train.loss.matryoshka": {"prefixes": [0.5, 0.25, 1]}},
            "train.loss.matryoshka: prefixes = [0.5, 0.25, 1.0] must rise, and end with 1",
        ),
        (
            {"train.loss.matryoshka": {"prefixes": [0.25, 0.5]}},
            "train.loss.matryoshka: prefixes = [0.25, 0.5] must rise, and end with 1",
        ),
        (
            {"train.loss.matryoshka": {"prefixes": [0.0001, 1]}},
            "train.loss.matryoshka.prefixes: 0.0001 of dictionary.features = 1024 is less than one feature",
        ),
        (
            {"train.loss.sparsity": {"kind": "l1", "coefficient": 1, "target_l0": 9}},
            "train.loss.sparsity.target_l0: only with kind l0",
        ),
        (
            {"train.loss.sparsity": {"kind": "l1", "coefficient": 1, "c": 9, "p_end": 0.5}},
            "train.loss.sparsity: c: only with kind tanh",
        ),
        *(
            (
                {"train.loss.sparsity": {"kind": "tanh", "coefficient": 1, "c": 9, **one}},
                f"train.loss.sparsity: {next(iter(one))}: only with kind lp",
            )
            for one in ({"p_end": 0.5}, {"p_hold": 0.5}, {"keep_strength": False})
        ),
        ({"dictionary.wiring": {"kind": "model_diff", "layer": 0}}, "base_model: missing; the wiring model_diff"),
        ({"generate.sites": ["mlp_in.0@base"]}, "base_model: missing; generate.sites names sites of it"),
        (
            {"base_model": {"name": "base"}},
            "base_model: the wiring clt does not read it; use model_diff, or base_model: ",
        ),
        (
            {"base_model": {"name": "base", "replace_tokens": [["<turn>", -1]]}},
            "base_model.replace_tokens: [['<turn>', -1]] should be pairs of tokens or ids, such as ",
        ),
        ({"a\nb": 1}, "a b: unknown setting; "),
        ({"": 1}, "'': unknown setting; "),
    ],
    ids=str,
)
def test_mistakes_say_where_what_and_what_is_allowed(overrides, line):
    assert message_of(overrides).startswith(line)


def test_long_values_are_cut():
    assert len(message_of({"train.lr": "x" * 9999})) < 200
    assert len(message_of({"train.lr": list(range(9999))})) < 200


def test_several_mistakes_are_counted():
    assert message_of({"train.lr": "x", "seed": "y"}).endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "f.yaml: expected a mapping of settings, found NoneType"),
        ("- a\n", "f.yaml: expected a mapping of settings, found list"),
        ("a: [1\n", "f.yaml: not YAML: line 2: "),
        ("a: 1\nb: 2\na: 3\n", "f.yaml: not YAML: line 3: a is given twice"),
        ("a:\n  b: {c: 1, c: 2}\n", "f.yaml: not YAML: line 2: c is given twice"),
        ("out: 2024-13-45\n", "f.yaml: not YAML: month must be in 1..12"),
        ("a: &a {b: *a}\n", "f.yaml: not YAML: a value that contains itself"),
        ("a: !!python/object:os.system {}\n", "f.yaml: not YAML: line 1: could not determine a constructor"),
        (b"\xff\xfe\xfa", "f.yaml: not YAML: "),
        ("[" * 5000, "f.yaml: not YAML: "),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_not_yaml_is_a_mistake_with_its_line(text, line):
    with pytest.raises(UserError) as error:
        load_config_text(text if isinstance(text, bytes) else text.encode(), "f.yaml")
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


def test_a_key_may_override_what_is_merged_in():
    text = TEXT.replace("cluster:\n", "cluster:\n  <<: {tensor_parallel: 1, replicas: 2}\n")
    cluster = load_config_text(text.encode(), "f.yaml").cluster
    assert (cluster.tensor_parallel, cluster.replicas) == (2, 2)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=f"{path}: cannot be read: "):
            load_config(path)


PATHS = sorted({path for path, *_ in walk()})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["all", "topk", "l0", "1e3"]),
)
KEYS = st.one_of(
    st.sampled_from([path.rsplit(".", 1)[-1] for path in PATHS]),
    st.text(max_size=6),
    st.integers(),
    st.none(),
    st.booleans(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
ANY_PATH = st.one_of(
    st.sampled_from(PATHS),
    st.builds("{}.{}".format, st.sampled_from(PATHS), st.text(max_size=6)),
    st.text(max_size=12),
)


def is_config_or_one_line(make) -> None:
    try:
        config = make()
    except UserError as found:
        line = str(found)
        assert len(line.splitlines()) == 1, line
        return
    assert isinstance(config, Config)
    assert load_config_text(config.yaml().encode(), "again") == config


@given(st.dictionaries(ANY_PATH, VALUES, min_size=1, max_size=3))
@settings(max_examples=250, deadline=None)
def test_any_overrides_give_settings_or_one_line(overrides):
    is_config_or_one_line(lambda: load_config(QUICKSTART, overrides))


@given(st.integers(0, len(TEXT)), st.integers(0, 8), st.text(st.characters(codec="utf-8"), max_size=5))
@settings(max_examples=100, deadline=None)
def test_a_file_with_any_typo_gives_settings_or_one_line(at, cut, typed):
    text = TEXT[:at] + typed + TEXT[at + cut :]
    is_config_or_one_line(lambda: load_config_text(text.encode(), "f.yaml"))


@given(st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_settings_or_one_line(data):
    is_config_or_one_line(lambda: load_config_text(data, "f.yaml"))


def test_a_hang_is_longer_than_what_a_file_system_is_waited_for():
    assert message_of({"cluster.hang_timeout_s": 60}) == (
        "cluster: hang_timeout_s = 60 should be more than read_retry_s = 60: a file system that is waited for would "
        "count as a hang"
    )
    BASE.override({"cluster.hang_timeout_s": 20, "cluster.read_retry_s": 10})
