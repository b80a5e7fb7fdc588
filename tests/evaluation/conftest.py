import pytest
import torch

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.config import Model

TINY = "configs/assets/tiny-austen-gpt2-d64"


@pytest.fixture(scope="session")
def model():
    return LanguageModel(Model(name=TINY))


@pytest.fixture(scope="session")
def windows(model):
    """tokens [6, 24], length [6], keep [6, 24]: three windows cut short; BOS and one more token are not kept."""
    tokens = torch.randint(5, 900, (6, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.tokenizer.eos_token_id
    length = torch.tensor([24, 24, 9, 24, 2, 17])
    keep = torch.arange(24) < length[:, None]
    keep[:, 0] = False
    keep[1, 5] = False
    return tokens, length, keep
