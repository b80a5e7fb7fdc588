import numpy as np
import pytest
import torch
import transformers as tf
from nnsight import TransformersModel

from xlc_ray.activations import sites, store
from xlc_ray.activations import text as T
from xlc_ray.activations.harvest import LanguageModel, harvest_chunk
from xlc_ray.config import Model, Text, UserError

TINY = Model(name="configs/assets/tiny-austen-gpt2-d64")
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SMALL),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": lambda: tf.Qwen2Config(**SMALL, num_key_value_heads=1),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, sliding_window=4, pad_token_id=0),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**GROUPED, sliding_window=4, pad_token_id=0),
}


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(TINY)


def random_model(family, lm):
    """A LanguageModel around random weights, all of them different from their initial 0 and 1."""
    torch.manual_seed(0)
    hf = tf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.3 * torch.randn_like(p))
    made = LanguageModel.__new__(LanguageModel)
    made.name, made.device, made.hf, made.tokenizer = family, torch.device("cpu"), hf, lm.tokenizer
    made.trace_model = TransformersModel(hf, task="text-generation", tokenizer=lm.tokenizer)
    return made


def first(value):
    return value[0] if isinstance(value, tuple) else value


def hooked(hf, blocks, tokens, mask):
    """What plain hooks on the model's blocks, MLPs and norms see: {(kind, layer): tensor}, and the blocks' own sums."""
    seen, handles = {}, []

    def hook(module, kind_in, kind_out, layer):
        def keep(_, args, kwargs, output):
            seen[kind_in, layer] = (args or tuple(kwargs.values()))[0].clone()
            seen[kind_out, layer] = first(output).clone()

        handles.append(module.register_forward_hook(keep, with_kwargs=True))

    for layer, block in enumerate(blocks):
        hook(block, "resid_pre", "resid_post", layer)
        hook(block.mlp, "mlp_in", "mlp_out", layer)
        attention = next(getattr(block, n) for n in ("attn", "self_attn", "attention") if hasattr(block, n))
        hook(attention, "attn_in", "attn_out", layer)
        if hasattr(block, "post_feedforward_layernorm"):
            hook(block.post_attention_layernorm, "raw_attn_out", "attn_out", layer)
            hook(block.post_feedforward_layernorm, "raw_mlp_out", "mlp_out", layer)
    with torch.no_grad():
        hf(tokens, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", CONFIGS)
def test_sites_equal_plain_hooks_and_add_up(family, lm):
    model = random_model(family, lm)
    hf = model.hf
    blocks = hf.transformer.h if family == "gpt2" else (hf.gpt_neox if family == "gpt_neox" else hf.model).layers
    tokens = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    length = torch.tensor([12, 7, 12])
    mask = (torch.arange(12) < length[:, None]).long()
    names = [f"{kind}.{layer}" for layer in (2, 0, 1) for kind in reversed(sites.KINDS)]  # any order may be asked for
    found = model.harvest(tokens, length, names)
    assert list(found) == names
    seen = hooked(hf, blocks, tokens, mask)
    for name, values in found.items():
        assert torch.equal(values, seen[sites.parse(name)]), name
        assert values.shape == (3, 12, sites.width(hf.config))
    assert sites.num_layers(hf.config) == 3
    for layer in range(3):
        before, after, attn, mlp = (found[f"{k}.{layer}"] for k in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        torch.testing.assert_close(before + attn + mlp, after)  # what is called added is what was added


def test_padding_changes_no_real_token(lm):
    tokens = torch.randint(1, 1000, (2, 20), generator=torch.Generator().manual_seed(0))
    names = ["mlp_in.3", "mlp_out.3"]
    padded = tokens.clone()
    padded[1, 11:] = 0
    whole = lm.harvest(tokens[1:, :11], torch.tensor([11]), names)
    found = lm.harvest(padded, torch.tensor([20, 11]), names)
    for name in names:
        torch.testing.assert_close(found[name][1, :11], whole[name][0])


def test_pass_stops_after_the_last_site(lm):
    ran = []
    handle = lm.hf.transformer.h[2].register_forward_hook(lambda *_: ran.append(2))
    lm.harvest(torch.ones(1, 4), torch.tensor([4]), ["mlp_out.1"])
    handle.remove()
    assert ran == []


def test_an_error_inside_the_trace_is_not_swallowed(lm):
    def fail(*_):
        raise RuntimeError("planted")

    handle = lm.hf.transformer.h[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        lm.harvest(torch.ones(1, 4), torch.tensor([4]), ["mlp_out.1", "mlp_out.2"])
    handle.remove()


@pytest.mark.parametrize("batch_windows", [1, 3, 100])
def test_chunk_rows_are_the_kept_tokens_in_row_order(lm, batch_windows):
    text = Text(dataset="x", context=16)
    windows = T.pack(["Emma Woodhouse, handsome, clever, and rich. " * 12], lm.tokenizer, text)
    mask = T.token_mask(windows, T.special_ids(lm.tokenizer), text)
    (chunk,) = T.chunk_plan([(windows, mask)], int(mask.sum()) - 3, 10_000, 5)
    names = ["mlp_out.1", "mlp_in.0"]
    found = harvest_chunk(lm, chunk, names, batch_windows, "float32")
    whole = lm.harvest(torch.from_numpy(chunk.windows.tokens), torch.from_numpy(chunk.windows.length), names)
    for name in names:
        expected = whole[name].numpy()[chunk.row_window, chunk.row_position]
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_chunk_is_the_rounded_float32_chunk(lm):
    (chunk,) = T.chunk_plan([_windows(lm)], 40, 100, 0)
    exact = harvest_chunk(lm, chunk, ["mlp_out.0"], 8, "float32")["mlp_out.0"]
    rounded = harvest_chunk(lm, chunk, ["mlp_out.0"], 8, "bfloat16")["mlp_out.0"]
    assert rounded.dtype == np.uint16
    assert torch.equal(store.decode(rounded, "bfloat16"), torch.from_numpy(exact).bfloat16().float())


def _windows(lm):
    text = Text(dataset="x", context=16)
    windows = T.pack(["She had lived nearly twenty-one years in the world. " * 5], lm.tokenizer, text)
    return windows, T.token_mask(windows, T.special_ids(lm.tokenizer), text)


def test_model_precision_is_as_asked():
    assert LanguageModel(TINY.model_copy(update={"dtype": "bfloat16"})).hf.dtype == torch.bfloat16


def test_context_and_vocabulary_beyond_the_model_are_refused(lm):
    with pytest.raises(UserError, match=r"text\.context: 129 exceeds the 128"):
        lm.harvest(torch.ones(1, 129), torch.tensor([129]), ["mlp_in.0"])
    with pytest.raises(UserError, match="more tokens than"):
        lm.harvest(torch.full((1, 4), 1024), torch.tensor([4]), ["mlp_in.0"])


def test_unknown_layer_and_family_are_refused(lm):
    with pytest.raises(UserError, match=r"mlp_in\.4.*0 to 3"):
        lm.harvest(torch.ones(1, 4), torch.tensor([4]), ["mlp_in.4"])


def test_missing_model_is_one_line():
    with pytest.raises(UserError, match=r"model\.name: no directory './no-model'"):
        LanguageModel(Model(name="./no-model"))
