"""Text: documents → tokens → windows → the plan of which rows stand in which chunk.

A task's documents are joined as `doc EOS doc EOS …` and cut into windows of `context` tokens, each beginning with BOS
if asked. A *row* is one kept token: a (window, position) that is no padding, not among the first `ignore_first`, not
special.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from xlc_ray.activations.documents import load_documents
from xlc_ray.activations.windows import ChunkText, Windows
from xlc_ray.config import Model, Text, UserError

__all__ = [
    "chunk_plan",
    "from_pretrained",
    "is_held_out",
    "load_documents",
    "load_tokenizer",
    "pack",
    "special_ids",
    "token_mask",
]


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer. Raises UserError where there is none, or it has neither BOS nor EOS."""
    tokenizer = from_pretrained(AutoTokenizer, model, "tokenizer")
    _boundaries(tokenizer)
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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


def is_held_out(document: str | None, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a hash of its text decides, so duplicates stay together."""
    digest = hashlib.blake2b((document or "").encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def pack(documents: Sequence[str | None], tokenizer: Any, text: Text) -> Windows:
    """Tokenise documents and cut them into windows; only the last may be shorter. No token is dropped."""
    bos, eos = _boundaries(tokenizer)
    lead = [bos] if text.prepend_bos else []
    room = text.context - len(lead)
    stream: list[int] = []
    if documents:
        cleaned = [document or "" for document in documents]
        # verbose=False: a document longer than the model's context is no mistake here.
        for ids in tokenizer(cleaned, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]:
            stream += ids
            stream.append(eos)
    count = -(-len(stream) // room)
    body = np.zeros(count * room, dtype=np.int32)
    body[: len(stream)] = stream
    tokens = np.concatenate([np.full((count, len(lead)), bos, np.int32), body.reshape(count, room)], axis=1)
    length = np.full(count, text.context, dtype=np.int32)
    if count:
        length[-1] = len(lead) + len(stream) - (count - 1) * room
    return Windows(tokens, length)


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
    raise UserError(f"text.dataset: text ended after {total} of {tokens} tokens; ask for fewer or give more text")


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
