"""Token windows, and which of their tokens are rows of a chunk. Apart, so that reading a store needs no tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Token windows int32 [n, context], padded on the right with 0, and the number of real tokens in each, [n]."""

    tokens: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ChunkText:
    """The text of one chunk: whole windows, and the (window, position) of each of its rows, in row order."""

    index: int
    windows: Windows
    row_window: np.ndarray
    """Window of each row within `windows`, int32 [rows]."""
    row_position: np.ndarray
    """Position of each row within its window, int32 [rows]."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_window)
