"""The medical corpus, against records written by hand in the fields of the six datasets."""

from __future__ import annotations

import json

import datasets
import pytest

from xlc_ray.activations import medical
from xlc_ray.activations.text import load_documents
from xlc_ray.config import Text, UserError

MEDQA = {
    "id": "1",
    "data": {
        "Question": "Which vitamin prevents scurvy?",
        "Options": {"A": "Vitamin A", "B": "Vitamin C", "C": "Vitamin D", "D": "Vitamin K"},
        "Correct Option": "B",
        "Correct Answer": "Vitamin C",
    },
}
MEDQA_TEXT = """Which vitamin prevents scurvy?
The options are:
Vitamin A
Vitamin C
Vitamin D
Vitamin K
Correct option: Vitamin C"""
MEDMCQA = {
    "id": "2",
    "question": "The longest bone is:",
    "opa": "Femur",
    "opb": "Tibia",
    "opc": "Ulna",
    "opd": "Fibula",
    "cop": 0,
    "exp": "It bears the weight. Ref: Gray 41st ed",
}
MEDMCQA_TEXT = """The longest bone is?
The options are:
Femur
Tibia
Ulna
Fibula
Correct option: Femur
Explanation: It bears the weight. """
PUBMED = {
    "data": {
        "Context": ["Aspirin was given.", "Half improved."],
        "Question": "Does aspirin help?",
        "Options": {"A": "yes", "B": "no", "C": "maybe"},
        "Correct Option": "A",
        "Correct Answer": "yes",
        "Long Answer": "It helps in half of the cases.",
    }
}
PUBMED_TEXT = """Context:
Aspirin was given.
Half improved.
Question: Does aspirin help?
The options are:
yes
no
maybe
Correct option: yes
Detailed answer: It helps in half of the cases."""
MMLU = ("mmlu_college_medicine", "mmlu_clinical_knowledge", "mmlu_professional_medicine")
ORDER = ("medqa", "medmcqa", "pubmed_qa", *MMLU)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A local copy of each source, of different kinds: files and saved datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = {}
    for name, record in (("medqa", MEDQA), ("pubmed_qa", PUBMED)):
        found[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    found["medmcqa"] = str(tmp_path / "medmcqa.parquet")
    datasets.Dataset.from_list([MEDMCQA, MEDMCQA | {"cop": 2}]).to_parquet(found["medmcqa"])
    for i, name in enumerate(MMLU):
        rows = [MEDQA | {"data": MEDQA["data"] | {"Question": f"{name}?"}}] * (i + 1)
        found[name] = str(tmp_path / name)
        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(found[name])
    return found


def mcq(strict=False, **changes) -> str:
    return medical.medmcqa(MEDMCQA | changes, strict)


@pytest.mark.parametrize("strict", [False, True])
def test_each_form(strict):
    assert medical.medqa(MEDQA, strict) == MEDQA_TEXT
    assert medical.medmcqa(MEDMCQA, strict) == MEDMCQA_TEXT
    assert medical.pubmed_qa(PUBMED, strict) == PUBMED_TEXT


@pytest.mark.parametrize(
    ("question", "mended", "strict"),
    [
        ("It is:", "It is?", "It is?"),
        ("It is::", "It is?", "It is?"),
        ("It is", "It is?", "It is?"),
        ("What is it?", "What is it?", "What is it??"),
        ("What is it?:", "What is it?", "What is it??"),
        ("What is it? ", "What is it? ", "What is it? ?"),
    ],
)
def test_question_marks(question, mended, strict):
    assert mcq(question=question).split("\n")[0] == mended
    assert mcq(strict=True, question=question).split("\n")[0] == strict


@pytest.mark.parametrize(
    ("explanation", "mended", "strict"),
    [
        (None, None, "None"),
        ("", None, ""),
        ("All of it.", "All of it.", "All of it."),
        ("Refractory shock. Ref Bailey p. 3", "Refractory shock. ", ""),
        ("See Reference values. References: Gray", "See Reference values. ", "See "),
        ("GERD is Reflux (Ref. Harrison)", "GERD is Reflux (", "GERD is "),
        ("Ref: Gray", None, ""),
    ],
)
def test_explanations(explanation, mended, strict):
    def shown(text):
        return text.partition("\nExplanation: ")[2] if "\nExplanation: " in text else None

    assert shown(mcq(exp=explanation)) == mended
    assert shown(mcq(strict=True, exp=explanation)) == strict


def test_an_explanation_that_is_no_field_is_left_out():
    bare = {name: value for name, value in MEDMCQA.items() if name != "exp"}
    for strict in (False, True):
        assert medical.medmcqa(bare, strict).endswith("\nCorrect option: Femur")


def test_options_that_only_other_records_have_are_left_out():
    data = MEDQA["data"] | {"Options": {**MEDQA["data"]["Options"], "E": None}}
    assert medical.medqa({"data": data}, False) == MEDQA_TEXT
    long = PUBMED["data"] | {"Long Answer": None}
    assert medical.pubmed_qa({"data": long}, False).endswith("\nCorrect option: yes")
    assert medical.pubmed_qa({"data": long}, True).endswith("\nDetailed answer: None")


@pytest.mark.parametrize(
    ("make", "record", "named"),
    [
        (medical.medqa, {"question": "x"}, "'data' is missing or null; there is question"),
        (medical.medqa, {"data": {"Question": "x", "Options": {"A": "a"}}}, "'Correct Option' is missing"),
        (
            medical.medqa,
            {"data": MEDQA["data"] | {"Correct Option": "E"}},
            "'E' is missing or null; there is A, B, C, D",
        ),
        (medical.medmcqa, MEDMCQA | {"cop": 4}, "cop = 4; allowed: 0 to 3"),
        (medical.medmcqa, MEDMCQA | {"cop": -1}, "cop = -1; allowed: 0 to 3"),
        (medical.medmcqa, MEDMCQA | {"opb": None}, "'opb' is missing or null"),
        (medical.pubmed_qa, {"data": PUBMED["data"] | {"Context": "one"}}, "Context should be a list"),
        (medical.pubmed_qa, {"data": PUBMED["data"] | {"Context": ["one", 2]}}, "Context should be text, not 2"),
        (medical.medqa, {"data": MEDQA["data"] | {"Options": ["x"]}}, r"Options should be \{letter: text\}, not list"),
        (medical.medqa, {"data": MEDQA["data"] | {"Options": {"A": 5}}}, "Options should be text, not 5"),
        (medical.medqa, {"data": MEDQA["data"] | {"Correct Option": ["B"]}}, "is missing or null; there is A, B"),
        (medical.medmcqa, MEDMCQA | {"exp": 5}, "exp should be text, not 5"),
    ],
)
def test_records_of_another_form_are_named(make, record, named):
    with pytest.raises(UserError, match=named):
        make(record, False)


def test_corpus_has_the_sources_in_their_order(places, tmp_path):
    counts = medical.prepare(str(tmp_path / "out"), tuple(reversed(ORDER)), places, False, None)
    assert counts == dict(zip(ORDER, (1, 2, 1, 1, 2, 3), strict=True))
    assert tuple(counts) == ORDER
    made = load_documents(Text(dataset=str(tmp_path / "out")))
    assert made.column_names == ["text", "source_dataset"]
    assert list(made["source_dataset"]) == [name for name, count in counts.items() for _ in range(count)]
    assert list(made["text"])[:5] == [
        MEDQA_TEXT,
        MEDMCQA_TEXT,
        MEDMCQA_TEXT.replace("Correct option: Femur", "Correct option: Ulna"),
        PUBMED_TEXT,
        MEDQA_TEXT.replace("Which vitamin prevents scurvy", MMLU[0]),
    ]
    assert list(made["text"])[-1].startswith(f"{MMLU[2]}?\nThe options")


def test_mistakes_are_one_line_and_leave_nothing(places, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(medical, "get_token", lambda: None)
    out, bad = str(tmp_path / "out"), tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(MEDQA) + "\n" + json.dumps({"data": None}) + "\n")
    before = sorted(tmp_path.iterdir())
    for sources, changed, push, named in (
        (("medqa", "pubmed"), {}, None, "--sources: 'pubmed' is unknown; did you mean pubmed_qa?"),
        (("medqa",), {"medmcqa": "x"}, None, "--source medmcqa: is not among --sources medqa"),
        (("medqa",), {"medqa": str(bad)}, None, f"--source medqa: record 1 of {bad}: 'data' is missing"),
        (("medqa",), {"medqa": "./nowhere"}, None, "--source medqa: no file or directory './nowhere'"),
        (("medqa",), {}, None, "--source medqa: 'openlifescienceai/medqa' cannot be loaded: "),
        (("medqa",), {"medqa": places["medqa"]}, "corpus", "--push-to-hub: 'corpus' should be user/name"),
        (("medqa",), {"medqa": places["medqa"]}, "a/b/c", "--push-to-hub: "),
        (("medqa",), {"medqa": places["medqa"]}, "me/corpus", "--push-to-hub: no token"),
    ):
        with pytest.raises(UserError) as error:
            medical.prepare(out, sources, changed, False, push)
        assert str(error.value).startswith(named)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--out: .* should be a local directory that does not exist yet"):
        medical.prepare(str(tmp_path), ("medqa",), {"medqa": places["medqa"]}, False, None)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "cache"] == [
        path for path in before if path.name != "cache"
    ]


def test_a_push_that_fails_keeps_the_corpus(places, tmp_path, monkeypatch):
    # Tests are offline: huggingface_hub refuses to speak.
    monkeypatch.setattr(medical, "get_token", lambda: "hf_x")
    with pytest.raises(UserError, match=r"--push-to-hub: me/corpus: .*; the corpus is at .*/out$"):
        medical.prepare(str(tmp_path / "out"), ("medqa",), {"medqa": places["medqa"]}, False, "me/corpus")
    assert len(load_documents(Text(dataset=str(tmp_path / "out")))) == 1


def test_what_is_pushed_is_what_was_written(places, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(medical, "get_token", lambda: "hf_x")
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda made, name: pushed.update({name: made}))
    medical.prepare(str(tmp_path / "out"), ("pubmed_qa",), {"pubmed_qa": places["pubmed_qa"]}, True, "me/corpus")
    assert list(pushed["me/corpus"]["text"]) == [PUBMED_TEXT]
