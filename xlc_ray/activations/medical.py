"""Medical question answering as text: six datasets, one document a question, as SAE Factory trains on it.

    MedQA, MMLU   {Question} / The options are: / {option} / … / Correct option: {option}
    MedMCQA       {question}? / The options are: / … / Correct option: {option} / Explanation: {up to its reference}
    PubMedQA      Context: / {passage} / … / Question: {…} / The options are: / … / Correct option: {…}
                  / Detailed answer: {…}

Columns `text` and `source_dataset`; of options only the values; a slash above is a new line. The form is that of the
published corpus charlieoneill/medical-qa-combined, and `SOURCES` names the Hub datasets and splits that it was made of.
Its slips are mended unless `strict`: "??" after questions that have their own "?", an explanation or detailed answer
"None", and explanations cut at any word that begins with "Ref" ("Refractory"). Tested on records written by hand in the
fields of these datasets; against the datasets themselves it was not run, for want of a network.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from xlc_ray import files
from xlc_ray.activations.documents import load_rows
from xlc_ray.config import Text, UserError
from xlc_ray.config.errors import nearest

Record = Mapping[str, Any]

OPTIONS = ("opa", "opb", "opc", "opd")
"""MedMCQA's options; `cop` counts them from 0."""

REFERENCE = re.compile(r"\bRef(?:s|erences?(?=\s*[:.-]))?\b")
"""Where an explanation turns into its source: "Ref: Harrison", "Ref Bailey", "Reference- …", but not "Refractory"."""


def medqa(record: Record, strict: bool) -> str:
    """Text of a MedQA or MMLU record: `data` with Question, Options {letter: text}, Correct Option (a letter).

    Raises UserError, as all of these, where a field is missing.
    """
    data = _field(record, "data")
    options, letter = _field(data, "Options"), _field(data, "Correct Option")
    return f"{_field(data, 'Question')}{_listed(_values(options))}\nCorrect option: {_field(options, str(letter))}"


def medmcqa(record: Record, strict: bool) -> str:
    """Text of a MedMCQA record: question, opa … opd, cop (0 to 3), exp (may be missing)."""
    options = [_field(record, name) for name in OPTIONS]
    stem = str(_field(record, "question")).rstrip(":")
    mark = "" if stem.rstrip().endswith("?") and not strict else "?"
    correct = _field(record, "cop")
    if str(correct) not in ("0", "1", "2", "3"):
        raise UserError(f"cop = {correct!r}; allowed: 0 to 3 for opa to opd, as on the Hub")
    return f"{stem}{mark}{_listed(options)}\nCorrect option: {options[int(correct)]}{_explanation(record, strict)}"


def _explanation(record: Record, strict: bool) -> str:
    if strict:
        return f"\nExplanation: {record['exp']}".split("Ref")[0] if "exp" in record else ""
    found = REFERENCE.split(_lines("exp", [record.get("exp") or ""]))[0]
    return f"\nExplanation: {found}" if found.strip() else ""


def pubmed_qa(record: Record, strict: bool) -> str:
    """Text of a PubMedQA record: `data` with Context (a list), Question, Options, Correct Answer, Long Answer."""
    data = _field(record, "data")
    context = _field(data, "Context")
    if not isinstance(context, list):
        raise UserError(f"Context should be a list of passages, not {type(context).__name__}")
    answer = data.get("Long Answer")
    detailed = f"\nDetailed answer: {answer}" if strict or answer is not None else ""
    return (
        "Context:\n" + _lines("Context", context) + f"\nQuestion: {_field(data, 'Question')}"
        f"{_listed(_values(_field(data, 'Options')))}\nCorrect option: {_field(data, 'Correct Answer')}{detailed}"
    )


def _listed(options: Iterable[Any]) -> str:
    return "\nThe options are:\n" + _lines("Options", options)


def _lines(name: str, parts: Iterable[Any]) -> str:
    parts = list(parts)
    if other := [part for part in parts if not isinstance(part, str)]:
        raise UserError(f"{name} should be text, not {other[0]!r}")
    return "\n".join(parts)


def _values(options: Any) -> list[Any]:
    """Options that are there: a column of records with four and with five gives the former an empty fifth."""
    if not isinstance(options, Mapping):
        raise UserError(f"Options should be {{letter: text}}, not {type(options).__name__}")
    return [option for option in options.values() if option is not None]


def _field(record: Record, name: str) -> Any:
    value = record.get(name) if isinstance(record, Mapping) else None
    if value is None:
        there = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
        raise UserError(f"{name!r} is missing or null; there is {there}")
    return value


@dataclass(frozen=True)
class Source:
    """Where a part of the corpus comes from, and how its records become text."""

    dataset: str
    split: str
    text: Callable[[Any, bool], str]


SOURCES = {
    "medqa": Source("openlifescienceai/medqa", "train", medqa),
    "medmcqa": Source("openlifescienceai/medmcqa", "train", medmcqa),
    "pubmed_qa": Source("openlifescienceai/pubmedqa", "train", pubmed_qa),
    "mmlu_college_medicine": Source("openlifescienceai/mmlu_college_medicine", "test", medqa),
    "mmlu_clinical_knowledge": Source("openlifescienceai/mmlu_clinical_knowledge", "test", medqa),
    "mmlu_professional_medicine": Source("openlifescienceai/mmlu_professional_medicine", "test", medqa),
}
"""In the order of the corpus."""


def prepare(
    out: str, sources: Sequence[str], places: Mapping[str, str], strict: bool, push_to_hub: str | None
) -> dict[str, int]:
    """Write the corpus of `sources` to the new local directory `out` (`save_to_disk`), and publish it if asked.

    `places`: {source: local file or directory, or another Hub dataset} instead of the one in SOURCES. Returns
    {source: documents}. Raises UserError, one line, where a name, a dataset or a record is not as it should be.
    """
    for name in (*sources, *places):
        if name not in SOURCES:
            raise UserError(f"--sources: {name!r} is unknown; {nearest(name, list(SOURCES))}")
    if spare := [name for name in places if name not in sources]:
        raise UserError(f"--source {spare[0]}: is not among --sources {','.join(sources)}")
    if files.is_url(out) or files.exists(out):
        raise UserError(f"--out: {out!r} should be a local directory that does not exist yet")
    if push_to_hub is not None:
        _check_repository(push_to_hub)
    made = corpus([name for name in SOURCES if name in sources], places, strict)
    _save(made, Path(files.local(out)))
    if push_to_hub is not None:
        _push(made, push_to_hub, out)
    names = made["source_dataset"]
    return {name: count for name in SOURCES if (count := sum(n == name for n in names))}


def corpus(sources: Sequence[str], places: Mapping[str, str], strict: bool) -> datasets.Dataset:
    """The documents of `sources`, one after another: columns `text`, `source_dataset`. Raises UserError, one line."""
    texts: list[str] = []
    names: list[str] = []
    for name in sources:
        source = SOURCES[name]
        place = places.get(name, source.dataset)
        number = -1
        try:
            for number, record in enumerate(load_rows(Text(dataset=place, split=source.split))):  # noqa: B007
                texts.append(source.text(record, strict))
        except UserError as error:
            where = f"record {number} of {place}: " if number >= 0 else ""
            raise UserError(f"--source {name}: {where}{str(error).removeprefix('text.dataset: ')}") from None
        names += [name] * (len(texts) - len(names))
    return datasets.Dataset.from_dict({"text": texts, "source_dataset": names})


def _save(made: datasets.Dataset, out: Path) -> None:
    """Whole or not at all."""
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    with files.writing(str(out)):
        try:
            made.save_to_disk(str(partial))
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {error}") from None
    if "/" not in name:
        raise UserError(f"--push-to-hub: {name!r} should be user/name")
    if get_token() is None:
        raise UserError("--push-to-hub: no token for the Hub; run `hf auth login` or set HF_TOKEN")


def _push(made: datasets.Dataset, name: str, out: str) -> None:
    try:
        made.push_to_hub(name)
    except HfHubHTTPError.__bases__ as error:  # the errors of whichever HTTP client the Hub's library has, and OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push-to-hub: {name}: {reason}; the corpus is at {out}") from None
