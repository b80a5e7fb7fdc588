"""Random numbers that are a pure function of where they are used, not of when: u = uniform(key, row, column).

Each is a hash of its place, so any part of the matrix of all u can be made alone: a shard's columns, a tile, or the few
entries of a support. The mixing steps are a 32-bit integer hash of two rounds of xor-shift and multiplication, with the
multipliers of C. Wellons' search for the least biased ones; in 64 bits they cannot overflow.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 2**22  # draws made at a time: their 64-bit states take 8 bytes each
BITS = 23  # (h + ½) / 2²³ is exact in float32 and lies strictly within (0, 1)


def key_of(*numbers: int) -> int:
    """A 32-bit key from a seed and the names of a draw."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def uniform(
    key: int, row: Int[Tensor, "*rows"], column: Int[Tensor, "*columns"], dtype: torch.dtype
) -> Float[Tensor, "*both"]:
    """u in (0, 1) at rows and columns, broadcast against each other (numbers below 2³¹)."""
    if row.dim() == 2 and row.shape[0] * column.shape[0] > BLOCK:
        parts = row.split(max(1, BLOCK // column.shape[0]))
        if len(parts) > 1:
            return torch.cat([uniform(key, part, column, dtype) for part in parts])
    state = _mix(_mix(row ^ key) + column)
    return ((state >> (32 - BITS)).to(dtype) + 0.5) / 2**BITS


def _mix(h: Tensor) -> Tensor:
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return h ^ (h >> 15)
