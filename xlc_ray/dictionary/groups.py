"""A group of features: its weights, and how they start."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as nnf
from jaxtyping import Float
from torch import Tensor, nn

from xlc_ray.dictionary.wiring import Tying

INIT_BLOCK = 256  # features drawn from one random stream, so that any slice of features can be made alone


class FeatureGroup(nn.Module):
    """W_enc [F, R_g], b_enc [F], W_dec [F, W_g]: row i is feature i; its decoder row holds all written sites.

    With tied decoders W_dec is [F, d], and `feature_scale`, `feature_offset` [F] (or None) belong to the group's own
    target: see tied.py."""

    feature_scale: nn.Parameter | None
    feature_offset: nn.Parameter | None

    def __init__(self, features: int, read_width: int, write_width: int, tying: Tying | None):
        super().__init__()
        self.feature_scale = nn.Parameter(torch.ones(features)) if tying and tying.scale else None
        self.feature_offset = nn.Parameter(torch.zeros(features)) if tying and tying.offset else None
        self.W_enc = nn.Parameter(torch.empty(features, read_width))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(torch.empty(features, write_width))

    @torch.no_grad()
    def initialise(self, seed: int, g: int, first: int, decoder_norm: float, tied: bool) -> None:
        """Random decoder rows of one norm; encoder rows a copy of them (`tied`) or random of norm 1.

        Row i depends on (seed, g, i) alone, not on how features are split over ranks."""
        features, width = self.W_dec.shape
        for block in range(first // INIT_BLOCK, -(-(first + features) // INIT_BLOCK)):
            stream = int(np.random.SeedSequence([seed, g, block]).generate_state(1, np.uint64)[0] >> 1)
            generator = torch.Generator().manual_seed(stream)
            rows = torch.randn(INIT_BLOCK, width + self.W_enc.shape[1], generator=generator, dtype=torch.float32)
            lo, hi = max(first, block * INIT_BLOCK), min(first + features, (block + 1) * INIT_BLOCK)
            rows = rows[lo - block * INIT_BLOCK : hi - block * INIT_BLOCK]
            decoder = nnf.normalize(rows[:, :width], dim=1) * decoder_norm
            self.W_dec[lo - first : hi - first] = decoder
            self.W_enc[lo - first : hi - first] = decoder if tied else nnf.normalize(rows[:, width:], dim=1)

    def norms(self) -> Float[Tensor, "F"]:
        """Norm of each row of W_dec. Its gradient at a zero row is zero."""
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def frozen(self) -> FeatureGroup:
        """The same group of the same memory, through which no gradient reaches the parameters."""
        made = copy.copy(self)
        vars(made)["_parameters"] = {name: p if p is None else p.detach() for name, p in self._parameters.items()}
        return made
