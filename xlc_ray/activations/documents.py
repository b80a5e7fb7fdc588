"""Documents: where text comes from. Local files, a directory of `save_to_disk`, or a dataset on the Hub.

A document is a text, a list of token ids, or a list of messages {role, content}; None and empty ones hold nothing.
Of a mixture with weights w, document n + 1 comes from the dataset i that is furthest behind its share,
argmax wᵢ (n + 1) − nᵢ: the order depends on nothing but the weights, and the shares hold from the first documents on.
"""

from __future__ import annotations

import glob
import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from xlc_ray.config import Text, UserError

Document = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or messages."""

TEXT, IDS, MESSAGES = "text", "token ids", "messages {role, content}"
"""What a column may hold."""

NONE_OF_THEM = f"not text, nor lists of {IDS} or of {MESSAGES}"

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings and what reads them."""

READ_AHEAD = 64
"""Documents that are read from a dataset at once."""

T = TypeVar("T")


def read_documents(text: Text) -> Iterator[Document | None]:
    """The documents of `text` in order, those of a mixture interleaved. Raises UserError like `load_documents`."""
    streams = [_stream(load_documents(part), part) for part in text.parts()]
    return interleave(streams, [share.weight for share in text.mixture] if text.mixture else [1.0])


def _stream(dataset: Any, text: Text) -> Iterator[Document | None]:
    with _reading(text):
        for rows in dataset.select_columns([text.column]).iter(batch_size=READ_AHEAD):
            yield from map(_without_absent, rows[text.column])


def _without_absent(document: Any) -> Any:
    """Messages without the keys that only other messages of the dataset have, which templates would take for given."""
    if not isinstance(document, list) or not document or not isinstance(document[0], dict):
        return document
    return [{key: value for key, value in message.items() if value is not None} for message in document]


def interleave(streams: Sequence[Iterable[T]], weights: Sequence[float]) -> Iterator[T]:
    """Take from each stream in proportion to its weight, until the one whose turn it is has ended."""
    left = [iter(stream) for stream in streams]
    taken = [0] * len(left)
    shares = [weight / sum(weights) for weight in weights]
    while True:
        total = sum(taken) + 1
        turn = max(range(len(left)), key=lambda i: shares[i] * total - taken[i])
        for item in left[turn]:
            yield item
            break
        else:
            return
        taken[turn] += 1


def load_documents(text: Text) -> datasets.Dataset | datasets.IterableDataset:
    """The documents of one dataset (no mixture), one a row in column `text.column`.

    Raises UserError, one line, where dataset, split or column is missing or the column holds no documents.
    """
    dataset = load_rows(text)
    column_kind(dataset, text)
    return dataset


def load_rows(text: Text) -> datasets.Dataset | datasets.IterableDataset:
    """All columns of the same, whatever they hold. Raises UserError, one line, where dataset or split is missing."""
    name = str(text.dataset)
    if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _saved(text)
    files = _local_files(name)
    if files is None:
        return _load(text, name, text.subset, split=text.split, streaming=text.streaming)
    endings = {Path(file).suffix.lower() for file in files}
    if len(endings) > 1:
        raise UserError(f"text.dataset: {name} mixes {', '.join(sorted(endings))}; give files of one kind")
    reader = READERS[endings.pop()]
    if reader == "text":
        return datasets.Dataset.from_dict({"text": _paragraph_documents(files, text.paragraphs)})
    # The files are whatever split the settings call them.
    return _load(text, reader, data_files={text.split: files}, split=text.split, streaming=text.streaming)


def _local_files(name: str) -> list[str] | None:
    """Files behind a local name, None for a name on the Hub."""
    path = Path(name)
    if path.is_dir():
        found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in READERS)
    elif path.is_file():
        found = [name] if path.suffix.lower() in READERS else []
    elif any(sign in name for sign in "*?["):
        found = sorted(file for file in glob.glob(name, recursive=True) if Path(file).suffix.lower() in READERS)
    elif name.startswith(("/", ".", "~")) or path.suffix.lower() in READERS:
        raise UserError(f"text.dataset: no file or directory {name!r}")
    else:
        return None
    if not found:
        raise UserError(f"text.dataset: {name!r} holds none of {', '.join(READERS)} and is no saved dataset")
    return found


def _saved(text: Text) -> Any:
    with _reading(text):
        found = datasets.load_from_disk(str(text.dataset))
    if isinstance(found, datasets.DatasetDict):
        if text.split not in found:
            raise UserError(
                f"text.split: {text.split!r} is not in {text.dataset}; allowed: {', '.join(map(str, found))}"
            )
        return found[text.split]
    return found


def _load(text: Text, *args: Any, **settings: Any) -> Any:
    with _reading(text):
        return datasets.load_dataset(*args, **settings)


@contextmanager
def _reading(text: Text) -> Iterator[None]:
    """Whatever the libraries raise of a dataset that is not there or damaged, as one line that names it."""
    try:
        yield
    except StopIteration:  # of JSON without a line
        raise UserError(f"text.dataset: {text.dataset} has no rows, or one of its files has none") from None
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:  # names, networks, files, unknown splits
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"text.dataset: {text.dataset!r} cannot be loaded: {reason}") from None


def column_kind(dataset: Any, text: Text) -> str:
    """What `text.column` holds: TEXT, IDS or MESSAGES. Raises UserError where it is missing or holds none of them."""
    features = dataset.features
    rows = [] if features else _first(dataset, text)  # a stream that does not say
    if not (features or rows) or (isinstance(dataset, datasets.Dataset) and not len(dataset)):
        raise UserError(f"text.dataset: {text.dataset} has no rows")
    columns = features or rows[0]
    if text.column not in columns:
        allowed = ", ".join(sorted(columns))
        raise UserError(f"text.column: {text.column!r} is not a column of {text.dataset}; allowed: {allowed}")
    feature = features[text.column] if features else None
    kind = _kind_of_feature(feature)
    if kind is None and "Json" in str(feature):  # objects of which each has keys of its own: a type that says nothing
        rows = _first(dataset, text)
    found = next((value for row in rows if (value := row.get(text.column))), None)
    kind = kind or _kind_of_value(found)
    if kind is None:
        held = (getattr(feature, "dtype", None) or " ".join(str(feature).split())) if not rows else reprlib.repr(found)
        raise UserError(f"text.column: {text.column!r} of {text.dataset} holds {held}, {NONE_OF_THEM}")
    return kind


def _first(dataset: Any, text: Text) -> list[dict[str, Any]]:
    with _reading(text):
        return list(itertools.islice(dataset, READ_AHEAD))


def _kind_of_feature(feature: Any) -> str | None:
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        return TEXT
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None
    if isinstance(inner, datasets.Value) and re.fullmatch(r"u?int\d+", inner.dtype):
        return IDS
    return MESSAGES if isinstance(inner, dict) and inner.keys() >= {"role", "content"} else None


def _kind_of_value(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return None
    if all(type(part) is int for part in value):
        return IDS
    return MESSAGES if all(isinstance(m, dict) and m.keys() >= {"role", "content"} for m in value) else None


def _paragraph_documents(files: list[str], paragraphs: int) -> list[str]:
    documents = []
    for file in files:
        try:
            content = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"text.dataset: {file} is not UTF-8 text") from None
        parts = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", content) if part.strip()]
        documents += ["\n\n".join(parts[i : i + paragraphs]) for i in range(0, len(parts), paragraphs)]
    return documents
