"""Documents: where text comes from. Local files, a directory of `save_to_disk`, or a dataset on the Hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from xlc_ray.config import Text, UserError

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings and what reads them."""


def load_documents(text: Text) -> datasets.Dataset | datasets.IterableDataset:
    """The documents of `text`, one a row in column `text.column`.

    Raises UserError, one line, where dataset, split or column is missing or the column holds no text.
    """
    if any((Path(text.dataset) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _check_column(_saved(text), text)
    files = _local_files(text.dataset)
    if files is None:
        return _check_column(_load(text, text.dataset, text.subset, split=text.split, streaming=text.streaming), text)
    endings = {Path(file).suffix.lower() for file in files}
    if len(endings) > 1:
        raise UserError(f"text.dataset: {text.dataset} mixes {', '.join(sorted(endings))}; give files of one kind")
    reader = READERS[endings.pop()]
    if reader == "text":
        if text.column != "text":
            raise UserError(f"text.column: {text.column!r} is not a column of {text.dataset}; allowed: text")
        return datasets.Dataset.from_dict({"text": _paragraph_documents(files, text.paragraphs)})
    # The files are whatever split the settings call them.
    loaded = _load(text, reader, data_files={text.split: files}, split=text.split, streaming=text.streaming)
    return _check_column(loaded, text)


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
    found = datasets.load_from_disk(text.dataset)
    if isinstance(found, datasets.DatasetDict):
        if text.split not in found:
            raise UserError(
                f"text.split: {text.split!r} is not in {text.dataset}; allowed: {', '.join(map(str, found))}"
            )
        return found[text.split]
    return found


def _load(text: Text, *args: Any, **settings: Any) -> Any:
    try:
        return datasets.load_dataset(*args, **settings)
    except (DatasetsError, OSError, ValueError) as error:  # names, networks, files; unknown splits and configurations
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"text.dataset: {text.dataset!r} cannot be loaded: {reason}") from None


def _check_column(dataset: Any, text: Text) -> Any:
    features = dataset.features
    if features is None:  # a stream that does not say: look at its first row
        first = next(iter(dataset), None)
        if first is None:
            raise UserError(f"text.dataset: {text.dataset} has no rows")
        features = {
            name: datasets.Value("string" if isinstance(value, str) else "null") for name, value in first.items()
        }
    if text.column not in features:
        allowed = ", ".join(sorted(features))
        raise UserError(f"text.column: {text.column!r} is not a column of {text.dataset}; allowed: {allowed}")
    kind = getattr(features[text.column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise UserError(f"text.column: {text.column!r} of {text.dataset} holds {kind}, not text")
    return dataset


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
