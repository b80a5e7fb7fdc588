"""Two models read the same tokens: what each sees, what is refused, and that rows belong together."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.tuned import save_tuned
from xlc_ray.activations import chunkfile, sites, store
from xlc_ray.activations import text as T
from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.activations.pair import ModelPair, load_models, replacements
from xlc_ray.config import Model, Text, UserError, load_config
from xlc_ray.config.activations import BaseOf

TINY = "configs/assets/tiny-austen-gpt2-d64"
BOTH = ["resid_post.1", "resid_post.1@base"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_tuned(TINY, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def pair(tuned):
    return ModelPair(LanguageModel(Model(name=tuned)), LanguageModel(Model(name=TINY)), {7: 300, 8: 7})


def test_each_model_gives_its_own_sites_of_the_same_tokens(pair):
    tokens = torch.randint(10, 900, (3, 12), generator=torch.Generator().manual_seed(0))
    length = torch.tensor([12, 5, 12])
    found = pair.harvest(tokens, length, [*reversed(BOTH), "mlp_out.0"])
    assert list(found) == [*reversed(BOTH), "mlp_out.0"]
    assert torch.equal(found["resid_post.1"], pair.model.harvest(tokens, length, BOTH[:1])["resid_post.1"])
    assert torch.equal(found["resid_post.1@base"], pair.base.harvest(tokens, length, BOTH[:1])["resid_post.1"])
    assert not torch.allclose(found["resid_post.1"], found["resid_post.1@base"])


def test_tokens_are_replaced_in_the_input_of_the_base_only_and_once(pair):
    tokens, length = torch.tensor([[0, 7, 50, 8, 51]]), torch.tensor([5])
    read = pair.base_tokens(tokens)
    assert read.tolist() == [[0, 300, 50, 7, 51]]  # 8 → 7 stays 7
    assert tokens.tolist() == [[0, 7, 50, 8, 51]]
    found = pair.harvest(tokens, length, BOTH)
    assert torch.equal(found[BOTH[1]], pair.base.harvest(read, length, BOTH[:1])[BOTH[0]])
    assert torch.equal(found[BOTH[0]], pair.model.harvest(tokens, length, BOTH[:1])[BOTH[0]])


def test_rows_of_a_chunk_belong_to_one_token_in_both_models(pair):
    text = Text(dataset="x", context=16, ignore_first=3)
    windows = T.pack(["Emma Woodhouse, handsome, clever, and rich. " * 12], pair.model.tokenizer, text)
    mask = T.token_mask(windows, T.special_ids(pair.model.tokenizer), text)
    (chunk,) = T.chunk_plan([(windows, mask)], int(mask.sum()), 10_000, 5)
    assert chunk.row_position.min() == 3
    found = harvest_chunk(pair, chunk, BOTH, 3, "float32")
    tokens, length = torch.from_numpy(chunk.windows.tokens), torch.from_numpy(chunk.windows.length)
    whole = pair.harvest(tokens, length, BOTH)
    for site in BOTH:
        expected = whole[site].numpy()[chunk.row_window, chunk.row_position]
        np.testing.assert_allclose(found[site], expected, rtol=1e-4, atol=1e-5)


def test_a_site_of_the_base_has_a_name_and_a_place_of_its_own():
    assert sites.parse("mlp_in.12@base") == ("mlp_in", 12)
    assert (sites.of_base("mlp_in.1@base"), sites.of_base("mlp_in.1")) == (True, False)
    names = [f"{kind}.{layer}{of}" for kind in sites.KINDS for layer in (0, 10) for of in ("", "@base")]
    assert len({chunkfile.dataset_name(name) for name in names}) == len(names)
    assert chunkfile.dataset_name("mlp_in.0") == "layer_0/inputs"  # crosslayer-coding's, of the model alone
    shuffled = ["resid_post.0@base", "resid_post.0", "mlp_in.0@base"]
    assert sorted(shuffled, key=sites.order_key) == ["mlp_in.0@base", "resid_post.0", "resid_post.0@base"]


@pytest.mark.parametrize("site", ["mlp_in.3@chat", "mlp_in.3@", "mlp_in@base.3", "mlp_in.3@base@base"])
def test_what_is_no_site_of_the_base_is_refused(site):
    with pytest.raises(UserError, match="@base"):
        sites.parse(site)


def test_a_store_keeps_both_models_apart(tmp_path):
    widths = {"mlp_in.0": 4, "mlp_out.0": 4, "mlp_in.0@base": 6}
    rows = {site: torch.randn(9, width) * 3**n for n, (site, width) in enumerate(widths.items())}
    config = load_config("configs/tiny_model_diff.yaml", {"generate.dtype": "float32"})
    what = store.identity(config, widths, False)
    assert what["base_model"]["name"] == "configs/assets/tiny-austen-gpt2"
    assert "base_model" not in store.identity(config, {"mlp_in.0": 4}, False), "what is not read decides nothing"
    store.begin(str(tmp_path), what)
    store.write_chunk(str(tmp_path), 0, {site: values.numpy() for site, values in rows.items()}, "float32")
    store.write_plan(str(tmp_path), [9])
    store.finish(str(tmp_path), what)
    opened = store.open_store(str(tmp_path))
    found, statistics = opened.read(0, 0, 9, list(widths)), opened.statistics()
    for site, values in rows.items():
        assert np.array_equal(found[site], values.numpy())
        np.testing.assert_allclose(statistics[site].mean, values.double().mean(0), rtol=1e-6)
        np.testing.assert_allclose(statistics[site].mean_norm, values.double().norm(dim=1).mean(), rtol=1e-6)


def tokenizer_of(*tokens):
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=made, name_or_path="of-the-model", unk_token=tokens[0])


def base_of(*replace_tokens):
    return BaseOf(name="of-the-base", replace_tokens=replace_tokens)


def test_tokens_are_named_by_id_by_vocabulary_or_as_text():
    model, base = tokenizer_of("?", "a", "b", "<turn>", "<end>"), tokenizer_of("?", "a", "b")
    assert replacements(model, base, base_of(("<turn>", "a"), (4, 2))) == {3: 1, 4: 2}
    assert replacements(base, model, base_of()) == {}, "a base may know more"
    bytes_of = LanguageModel(Model(name=TINY)).tokenizer
    space = bytes_of.get_vocab()["Ġthe"]
    assert replacements(bytes_of, bytes_of, base_of((" the", "Ġthe"))) == {space: space}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((), r"3 is '<turn>' to of-the-model and no token to of-the-base; .*replace_tokens"),
        ((("<turn>", "a"), (3, "b")), r"replace_tokens: 3 is replaced twice"),
        ((("a b", "a"),), r"replace_tokens: 'a b' is .* tokens? of of-the-model; allowed: ids"),
        (((9, "a"),), r"replace_tokens: 9 is no tokens of of-the-model"),
        (((3, 7),), r"replace_tokens: 7 is no tokens"),
    ],
)
def test_tokens_that_the_base_cannot_read_are_one_line(pairs, message):
    model, base = tokenizer_of("?", "a", "b", "<turn>"), tokenizer_of("?", "a", "b")
    with pytest.raises(UserError, match=message) as error:
        replacements(model, base, base_of(*pairs))
    assert "\n" not in str(error.value)


def test_an_id_that_means_another_token_is_refused():
    with pytest.raises(UserError, match="same token ids, but 1 is 'a' to of-the-model and 'b' to of-the-base"):
        replacements(tokenizer_of("?", "a", "b"), tokenizer_of("?", "b", "a"), base_of())


def test_both_models_are_loaded_only_where_both_are_read(tuned):
    config = load_config("configs/tiny_model_diff.yaml", {"model.name": tuned, "base_model.name": TINY})
    assert isinstance(load_models(config, BOTH, "cpu"), ModelPair)
    assert isinstance(load_models(config, BOTH[:1], "cpu"), LanguageModel)
    missing = config.override({"base_model.name": "./nowhere"})
    with pytest.raises(UserError, match=r"base_model\.name: no directory './nowhere'"):
        load_models(missing, BOTH, "cpu")
