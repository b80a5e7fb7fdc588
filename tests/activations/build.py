"""Stores of known content for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from xlc_ray.activations import store
from xlc_ray.activations.windows import ChunkText, Windows

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
SITES = {"mlp_in.0": 6, "mlp_out.0": 6, "resid_post.0": 4}


def numbered(rows: int, first: int, width: int, salt: int) -> torch.Tensor:
    """Rows whose first two columns say which row of the store they are: bfloat16 counts exactly to 256."""
    ids = torch.arange(first, first + rows)
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(salt + first))
    values[:, 0], values[:, 1] = ids // 256, ids % 256
    return values


def row_ids(values: torch.Tensor) -> list[int]:
    """Which rows of the store these are."""
    return (values[:, 0].float() * 256 + values[:, 1].float()).long().tolist()


def identity(sites: dict[str, int], dtype: str = "bfloat16", **changes: object) -> dict:
    settings = {
        "model": {"name": "tiny"},
        "text": {"dataset": "novels.txt", "split": "train", "context": 8},
        "sites": sites,
        "dtype": dtype,
        "chunk_tokens": 50,
    }
    return settings | changes


def make(path: Path | str, rows: list[int], dtype: str = "bfloat16", sites: dict[str, int] = SITES) -> store.Store:
    """A complete store with chunks of `rows` rows, numbered through."""
    path = str(path)
    store.begin(path, identity(sites, dtype))
    first = 0
    for index, count in enumerate(rows):
        store.write_text(path, chunk_text(index, count))
        write(path, index, count, first, dtype, sites)
        first += count
    store.write_plan(path, rows)
    store.finish(path, identity(sites, dtype))
    return store.open_store(path)


def arrays(count: int, first: int, dtype: str = "bfloat16", sites: dict[str, int] = SITES) -> dict[str, np.ndarray]:
    return {
        site: store.encode(numbered(count, first, width, salt), dtype, site)
        for salt, (site, width) in enumerate(sites.items())
    }


def write(
    path: str, index: int, count: int, first: int, dtype: str = "bfloat16", sites: dict[str, int] = SITES
) -> None:
    store.write_chunk(path, index, arrays(count, first, dtype, sites), dtype)


def chunk_text(index: int, rows: int) -> ChunkText:
    """Windows of 8 tokens, of which all but the first are rows."""
    count = -(-rows // 7)
    tokens = np.arange(count * 8, dtype=np.int32).reshape(count, 8)
    row = np.arange(rows, dtype=np.int32)
    return ChunkText(index, Windows(tokens, np.full(count, 8, np.int32)), row // 7, row % 7 + 1)


def row_tokens(text: ChunkText) -> np.ndarray:
    """Token id of each row, int32 [rows]."""
    return text.windows.tokens[text.row_window, text.row_position]
