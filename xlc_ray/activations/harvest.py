"""Harvest: one forward pass of the language model, traced by nnsight, gives the activations of all sites asked for.

The pass stops after the last of them, so that the unembedding is never computed. Windows are padded on the right and
the padding is masked. Nothing here knows about batches of training or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xlc_ray.activations import sites as site_names
from xlc_ray.activations.chunkfile import encode, stored_dtype
from xlc_ray.activations.text import from_pretrained, load_tokenizer
from xlc_ray.activations.windows import ChunkText
from xlc_ray.config import Model, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xlc_ray.activations.pair import ModelPair


class LanguageModel:
    """A causal language model in evaluation mode.

    `hf` is the transformers model, `trace_model` the nnsight model around it, `tokenizer` its tokenizer.
    """

    def __init__(self, model: Model, device: str | torch.device = "cpu") -> None:
        from nnsight import TransformersModel  # two seconds of imports, for who has a model only
        from transformers import AutoModelForCausalLM

        self.name = model.name
        self.device = torch.device(device)
        self.tokenizer: Any = load_tokenizer(model)
        hf = from_pretrained(AutoModelForCausalLM, model, "model", dtype=getattr(torch, model.dtype))
        self.hf: Any = hf.to(self.device).eval().requires_grad_(False)
        self.trace_model: Any = TransformersModel(self.hf, task="text-generation", tokenizer=self.tokenizer)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return site_names.num_layers(self.hf.config)

    @property
    def width(self) -> int:
        """Width of every site."""
        return site_names.width(self.hf.config)

    def check(self, tokens: torch.Tensor) -> None:
        """Raises UserError where the model cannot read these windows [n, context]."""
        config = self.hf.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and tokens.shape[1] > positions:
            raise UserError(f"text.context: {tokens.shape[1]} exceeds the {positions} positions of {self.name}")
        if tokens.numel() and int(tokens.max()) >= config.vocab_size:
            raise UserError(
                f"model.name: the tokenizer of {self.name} has more tokens than its model's {config.vocab_size}"
            )

    @torch.no_grad()
    def harvest(self, tokens: torch.Tensor, length: torch.Tensor, sites: Sequence[str]) -> dict[str, torch.Tensor]:
        """Activations of windows [n, context], of which the first `length` [n] tokens are real.

        Returns {site: [n, context, width]} in the model's precision and on its device; rows of padding mean nothing.
        """
        self.check(tokens)
        tokens = tokens.to(self.device, torch.long)
        mask = (torch.arange(tokens.shape[1], device=self.device) < length.to(self.device)[:, None]).long()
        # nnsight serves values in the order in which the model computes them.
        ordered = sorted(dict.fromkeys(sites), key=site_names.order_key)
        places = [(site, *self._envoy(site)) for site in ordered]
        found: dict[str, torch.Tensor] = {}
        with self.trace_model.trace(tokens, attention_mask=mask, use_cache=False) as tracer:
            for site, envoy, end in places:
                value = envoy.input if end == "input" else envoy.output
                found[site] = (value[0] if isinstance(value, tuple) else value).save()
            tracer.stop()
        return {site: found[site] for site in sites}

    def _envoy(self, site: str) -> tuple[Any, str]:
        path, end = site_names.locate(self.hf, site)
        envoy = self.trace_model
        for part in path.split("."):
            envoy = envoy[int(part)] if part.isdecimal() else getattr(envoy, part)
        return envoy, end


def harvest_chunk(
    lm: LanguageModel | ModelPair, chunk: ChunkText, sites: Sequence[str], batch_windows: int, dtype: str
) -> dict[str, np.ndarray]:
    """Activations of the kept rows of one chunk, in its row order: {site: [rows, width]} in the stored form of `dtype`.

    Raises UserError where a finite activation does not fit `dtype`.
    """
    out: dict[str, np.ndarray] = {}
    by_window = np.argsort(chunk.row_window, kind="stable")
    starts = range(0, len(chunk.windows.tokens), batch_windows)
    ends = np.searchsorted(chunk.row_window[by_window], [start + batch_windows for start in starts])
    for start, begin, end in zip(starts, [0, *ends[:-1]], ends, strict=True):
        chosen = by_window[begin:end]
        stop = start + batch_windows
        found = lm.harvest(
            torch.from_numpy(chunk.windows.tokens[start:stop]),
            torch.from_numpy(chunk.windows.length[start:stop]),
            sites,
        )
        window = torch.from_numpy(chunk.row_window[chosen].astype(np.int64) - start).to(lm.device)
        position = torch.from_numpy(chunk.row_position[chosen].astype(np.int64)).to(lm.device)
        for site, values in found.items():
            if site not in out:
                out[site] = np.empty((chunk.rows, values.shape[-1]), stored_dtype(dtype))
            out[site][chosen] = encode(values[window, position], dtype, site)
    return out
