"""Two models read the same tokens: a model, and the one that it was fine-tuned from.

The tokenizer is the model's. Every id that it makes must be the same token to the base, but for those of
`base_model.replace_tokens` (control tokens of a chat, say): at their positions the base reads another token.
Sites of the base end in "@base".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.activations.sites import of_base
from xlc_ray.activations.text import load_tokenizer
from xlc_ray.config import Config, UserError
from xlc_ray.config.activations import BaseOf


class ModelPair:
    """`model`, `base`: the language models. Harvests sites of both at once, row by row of the same tokens."""

    def __init__(self, model: LanguageModel, base: LanguageModel, replaced: dict[int, int]) -> None:
        """`replaced`: token id → the id that the base reads instead."""
        self.model, self.base, self.replaced, self.device = model, base, replaced, model.device

    def of(self, site: str) -> LanguageModel:
        """The model that a site is in."""
        return self.base if of_base(site) else self.model

    def base_tokens(self, tokens: Tensor) -> Tensor:
        """What the base reads where the model reads `tokens`: same shape."""
        read = tokens.clone()
        for token, other in self.replaced.items():
            read[tokens == token] = other
        return read

    def harvest(self, tokens: Tensor, length: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """Like `LanguageModel.harvest`, of sites of both models."""
        own, of_its_base = ([site for site in sites if of_base(site) is base] for base in (False, True))
        found = self.model.harvest(tokens, length, own) if own else {}
        if of_its_base:
            found |= self.base.harvest(self.base_tokens(tokens), length, of_its_base)
        return {site: found[site] for site in sites}


def load_models(config: Config, sites: Sequence[str], device: str | torch.device) -> LanguageModel | ModelPair:
    """The model that these sites are in, or both. Raises UserError where one cannot be loaded or they do not fit."""
    if not any(map(of_base, sites)):
        return LanguageModel(config.model, device)
    assert config.base_model is not None, "the settings have been checked"
    model, base = LanguageModel(config.model, device), LanguageModel(config.base_model, device)
    return ModelPair(model, base, replacements(model.tokenizer, base.tokenizer, config.base_model))


def check_pair(config: Config) -> None:
    """Raises UserError, before anything is loaded but tokenizers, where both models cannot read the same tokens."""
    if config.base_model:
        replacements(load_tokenizer(config.model), load_tokenizer(config.base_model), config.base_model)


def replacements(tokenizer: Any, base: Any, settings: BaseOf) -> dict[int, int]:
    """Token id of the model's `tokenizer` → the id that the base reads instead.

    Raises UserError where a token of either side is none, and where another id is not the same token in `base`.
    """
    found: dict[int, int] = {}
    for token, other in settings.replace_tokens:
        source = _token_id(token, tokenizer, settings)
        if source in found:
            raise UserError(f"base_model.replace_tokens: {token!r} is replaced twice")
        found[source] = _token_id(other, base, settings)
    known = {i: token for token, i in base.get_vocab().items()}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if i not in found and known.get(i) != token:
            what = repr(known[i]) if i in known else "no token"
            raise UserError(
                f"base_model.name: both models must read the same token ids, but {i} is {token!r} to "
                f"{tokenizer.name_or_path} and {what} to {settings.name}; give the model that it was fine-tuned from, "
                "or say in base_model.replace_tokens what the base shall read instead"
            )
    return found


def _token_id(token: int | str, tokenizer: Any, settings: BaseOf) -> int:
    """The id of a token: as the vocabulary writes it, else as text that is one token."""
    vocabulary = tokenizer.get_vocab()
    if isinstance(token, int):
        ids = [token] if token in vocabulary.values() else []
    elif token in vocabulary:
        ids = [vocabulary[token]]
    else:
        ids = [i for i in tokenizer.encode(token, add_special_tokens=False) if i != tokenizer.unk_token_id]
    if len(ids) != 1:
        raise UserError(
            f"base_model.replace_tokens: {token!r} is {len(ids) or 'no'} token{'s' * (len(ids) != 1)} of "
            f"{tokenizer.name_or_path}; allowed: ids and texts of one token"
        )
    return ids[0]
