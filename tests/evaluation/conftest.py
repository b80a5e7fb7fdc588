import pytest
import torch

from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.activations.store import begin, finish, identity, open_store, write_chunk, write_plan, write_text
from xlc_ray.activations.text import chunk_plan, is_held_out, load_documents, pack, special_ids, token_mask
from xlc_ray.config import Config, Model
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.build import build, make_wiring

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


@pytest.fixture(scope="session")
def config():
    """Settings of a CLT of the tiny model, measured on 600 rows and 12 windows of `store`."""
    return Config.model_validate(
        {
            "out": "run",
            "model": {"name": TINY},
            "text": {"dataset": "configs/assets/austen.txt", "context": 32},
            "generate": {"tokens": 100, "held_out_tokens": 700, "chunk_tokens": 300, "dtype": "float32"},
            "source": {"path": "data"},
            "dictionary": {"wiring": {"kind": "clt"}, "features": 32, "gate": {"kind": "batchtopk", "k": 4}},
            "train": {"steps": 3, "batch_tokens": 8, "lr": 1e-3},
            "evaluate": {"tokens": 600, "batch_tokens": 128, "windows": 12, "batch_windows": 5},
        }
    )


@pytest.fixture(scope="session")
def store(config, tmp_path_factory):
    """700 held-out rows in chunks of at most 300."""
    path = str(tmp_path_factory.mktemp("data") / "held_out")
    model = LanguageModel(config.model)
    documents = [d["text"] for d in load_documents(config.text) if is_held_out(d["text"], 0.05)]
    windows = pack(documents[:8], model.tokenizer, config.text)
    mask = token_mask(windows, special_ids(model.tokenizer), config.text)
    sites = [f"{kind}.{n}" for n in range(4) for kind in ("mlp_in", "mlp_out")]
    what = identity(config, dict.fromkeys(sites, model.width), held_out=True)
    begin(path, what)
    plan = list(chunk_plan([(windows, mask)], config.generate.held_out_tokens, 300, config.seed))
    for chunk in plan:
        write_text(path, chunk)
        write_chunk(path, chunk.index, harvest_chunk(model, chunk, sites, 8, "float32"), "float32")
    write_plan(path, [chunk.rows for chunk in plan])
    finish(path, what)
    return open_store(path)


@pytest.fixture(scope="session")
def dictionary(config):
    return build(config.dictionary, make_wiring(config.dictionary.wiring, 4, 64), 0, Shards())
