"""Text: documents → tokens → windows → the plan of which rows stand in which chunk.

Packed, a task's documents, without those that hold nothing, are joined as `doc EOS doc EOS …` and cut into windows of
`context` tokens, each beginning with BOS if asked. Or each document is a window of its own, cut at `context` or padded.
A *row* is one kept token: a (window, position) that is no padding, not among the first `ignore_first`, not special.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from xlc_ray.activations.documents import MESSAGES, NONE_OF_THEM, Document, column_kind, load_documents, read_documents
from xlc_ray.activations.windows import ChunkText, Windows
from xlc_ray.config import Model, Text, UserError

__all__ = [
    "check_documents",
    "chunk_plan",
    "from_pretrained",
    "is_held_out",
    "load_documents",
    "load_tokenizer",
    "pack",
    "read_documents",
    "special_ids",
    "token_ids",
    "token_mask",
]


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer. Raises UserError where there is none, or it has neither BOS nor EOS."""
    from transformers import AutoTokenizer  # slow to import

    tokenizer = from_pretrained(AutoTokenizer, model, "tokenizer")
    _boundaries(tokenizer)
    if not tokenizer.vocab_size:  # of a directory without its files: only the special tokens of its class
        raise UserError(f"{model.section}.name: {model.name!r} holds no tokenizer; save the model's own beside it")
    return tokenizer


def from_pretrained(auto: Any, model: Model, what: str, **settings: Any) -> Any:
    """What a transformers auto class loads for `model`. Raises UserError, one line, where it cannot."""
    name, where = model.name, f"{model.section}.name"
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"{where}: no directory {name!r}")
    settings |= {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return auto.from_pretrained(name, **settings)
    except (OSError, ValueError) as error:  # what transformers and the Hub raise for names, files and networks
        reason = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
        raise UserError(f"{where}: the {what} of {name!r} cannot be loaded: {reason}") from None


def _boundaries(tokenizer: Any) -> tuple[int, int]:
    """(id that begins a window, id that ends a document)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise UserError("model.name: its tokenizer has neither a BOS nor an EOS token; windows need one")
    return (eos if bos is None else bos), (bos if eos is None else eos)


def special_ids(tokenizer: Any) -> np.ndarray:
    """Ids of the tokenizer's special tokens, sorted int32."""
    return np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int32)


def check_documents(text: Text, tokenizer: Any) -> None:
    """Raises UserError where a dataset cannot be read, or holds messages and the tokenizer has no chat template."""
    for part in text.parts():
        if column_kind(load_documents(part), part) == MESSAGES:
            _check_template(tokenizer, part)


def _check_template(tokenizer: Any, text: Text) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"text.column: {text.column!r} of {text.label} holds messages, and the tokenizer of "
            f"{tokenizer.name_or_path} has no chat template; give a model whose tokenizer has one, or a column of text"
        )


def is_held_out(document: Document | None, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a hash of its content decides, so duplicates stay together."""
    content = document if isinstance(document, str) else json.dumps(document, sort_keys=True) if document else ""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def pack(documents: Sequence[Document | None], tokenizer: Any, text: Text) -> Windows:
    """Tokenise documents and make windows of them as `text.windows` says; packed, only the last may be shorter.

    No token of packed documents is dropped; those that hold nothing add none. Raises UserError like `token_ids`.
    """
    bos, eos = _boundaries(tokenizer)
    ids = token_ids(documents, tokenizer, text)
    lead = [bos] if text.prepend_bos else []
    if text.windows == "one_per_document":
        return _windows([[*lead, *document][: text.context] for document in ids if document], text.context)
    stream: list[int] = []
    for document in filter(None, ids):
        stream += document
        if document[-1:] != [eos]:  # templates and tokenised text may have ended it themselves
            stream.append(eos)
    room = text.context - len(lead)
    return _windows([[*lead, *stream[at : at + room]] for at in range(0, len(stream), room)], text.context)


def _windows(rows: Sequence[Sequence[int]], context: int) -> Windows:
    tokens = np.zeros((len(rows), context), dtype=np.int32)
    for window, row in zip(tokens, rows, strict=True):
        window[: len(row)] = row
    return Windows(tokens, np.array([len(row) for row in rows], dtype=np.int32))


def token_ids(documents: Sequence[Document | None], tokenizer: Any, text: Text) -> list[list[int]]:
    """Token ids of each document; without the BOS at its beginning, if there is one and windows get their own.

    Messages are rendered by the tokenizer's chat template. Raises UserError where that fails, where a document is
    none of what it may be, and where given ids are not the tokenizer's or, as windows of their own, do not fit.
    """
    bos, vocabulary = _boundaries(tokenizer)[0], len(tokenizer)
    found: list[list[int]] = [[] for _ in documents]
    texts: dict[int, str] = {}
    for i, document in enumerate(documents):
        if isinstance(document, str):
            texts[i] = document
        elif document in (None, []):
            continue
        elif isinstance(document, Sequence) and all(isinstance(part, Mapping) for part in document):
            texts[i] = _rendered(document, tokenizer, text)
        else:
            found[i] = _checked(document, vocabulary, tokenizer, text)
    if texts:
        # verbose=False: a document longer than the model's context is no mistake here.
        made = tokenizer(list(texts.values()), add_special_tokens=False, return_attention_mask=False, verbose=False)
        for i, ids in zip(texts, made["input_ids"], strict=True):
            found[i] = ids
    return [ids[1:] if text.prepend_bos and ids[:1] == [bos] else ids for ids in found]


def _rendered(messages: Sequence[Any], tokenizer: Any, text: Text) -> str:
    _check_template(tokenizer, text)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError) as error:  # of conversations they do not allow, and of content in parts
        roles = ", ".join(str(message.get("role")) for message in messages[:8])
        reason = f"of {tokenizer.name_or_path} refuses messages of {roles}: {error}"
        raise UserError(f"text.column: {text.column!r} of {text.label}: the chat template {reason}") from None


def _checked(ids: Any, vocabulary: int, tokenizer: Any, text: Text) -> list[int]:
    where = f"text.column: {text.column!r} of {text.label}"
    if not isinstance(ids, Sequence) or {*map(type, ids)} - {int, type(None)}:
        raise UserError(f"{where} holds {reprlib.repr(ids)}, {NONE_OF_THEM}")
    if None in ids:
        raise UserError(f"{where}: token id null is not of any tokenizer; allowed: 0 to {vocabulary - 1}")
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocabulary:
        raise UserError(
            f"{where}: token id {highest if lowest >= 0 else lowest} is not of the tokenizer of "
            f"{tokenizer.name_or_path}; allowed: 0 to {vocabulary - 1}"
        )
    if text.windows == "one_per_document":
        needed = len(ids) + (text.prepend_bos and ids[0] != _boundaries(tokenizer)[0])
        if needed > text.context:  # whoever tokenised it meant it whole
            raise UserError(
                f"{where}: {len(ids)} token ids do not fit a window of text.context = {text.context}; "
                f"allowed: at least {needed}, or text.windows packed"
            )
    return list(ids)


def token_mask(windows: Windows, special: np.ndarray, text: Text) -> np.ndarray:
    """Which tokens are rows: bool [n, context]. `special` holds the ids that `ignore_special` leaves out."""
    position = np.arange(windows.tokens.shape[1])
    kept = (position < windows.length[:, None]) & (position >= text.ignore_first)
    return kept & ~np.isin(windows.tokens, special) if text.ignore_special else kept


def chunk_plan(
    windows_stream: Iterable[tuple[Windows, np.ndarray]], tokens: int, chunk_tokens: int, seed: int
) -> Iterator[ChunkText]:
    """Group windows, with their masks, into chunks of at most `chunk_tokens` rows, `tokens` rows in all.

    A window never spans chunks; the last is cut so that the total is exact. The rows of chunk i are permuted by
    `default_rng([seed, i])`: this is the row order of its file. Raises UserError where the text ends too early.
    """
    index = total = rows = 0
    group: list[_Kept] = []
    for window in _kept_windows(windows_stream):
        take = min(len(window.positions), tokens - total)
        if take > chunk_tokens:
            raise UserError(f"generate.chunk_tokens: {chunk_tokens} is less than the {take} kept tokens of one window")
        if rows + take > chunk_tokens:
            yield _chunk(index, group, seed)
            index, rows, group = index + 1, 0, []
        group.append(_Kept(window.tokens, window.length, window.positions[:take]))
        rows, total = rows + take, total + take
        if total == tokens:
            yield _chunk(index, group, seed)
            return
    raise UserError(
        f"text.dataset: text ended after {total} of {tokens} tokens; give more text, or ask for fewer: generate.tokens "
        "or, of the share text.held_out_fraction of the documents alone, generate.held_out_tokens "
        "(a mixture ends with the first of its datasets to end)"
    )


@dataclass(frozen=True)
class _Kept:
    tokens: np.ndarray
    length: int
    positions: np.ndarray


def _kept_windows(stream: Iterable[tuple[Windows, np.ndarray]]) -> Iterator[_Kept]:
    for windows, mask in stream:
        for tokens, length, kept in zip(windows.tokens, windows.length, mask, strict=True):
            positions = np.flatnonzero(kept).astype(np.int32)
            if len(positions):  # a window without rows need not be read by the model
                yield _Kept(tokens, int(length), positions)


def _chunk(index: int, group: list[_Kept], seed: int) -> ChunkText:
    windows = Windows(np.stack([w.tokens for w in group]), np.array([w.length for w in group], dtype=np.int32))
    row_window = np.repeat(np.arange(len(group), dtype=np.int32), [len(w.positions) for w in group])
    row_position = np.concatenate([w.positions for w in group])
    mix = np.random.default_rng([seed, index]).permutation(len(row_window))
    return ChunkText(index, windows, row_window[mix], row_position[mix])
