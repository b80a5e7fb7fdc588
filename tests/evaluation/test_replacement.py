"""The replacement model under nnsight against plain hooks, and what must hold for dictionaries with known answers."""

import pytest
import torch
import torch.nn.functional as nnf
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.config import Model, UserError
from xlc_ray.config.dictionary import Dictionary as Settings
from xlc_ray.dictionary import Shards, wiring
from xlc_ray.dictionary.build import build
from xlc_ray.evaluation.replacement import Score, ablate, evaluate_replacement, forward, prepare, replaceable_in_place

from .conftest import TINY

LAYERS, WIDTH = 4, 64


def make(wires, features=48, gate=None, seed=0):
    """A random dictionary, biases and thresholds included, in inference form."""
    config = Settings(wiring={"kind": "clt"}, features=features, gate=gate or {"kind": "relu"}, decoder_norm=1.0)
    found = build(config, wires, seed, Shards()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (found.b_dec, found.read_mean, *found.W_skip, *(group.b_enc for group in found.groups)):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        found.write_scale.mul_(0.7)
    return found


def identity(wires):
    """f = ReLU(±x), decoded by ± unit rows: every site is its own reconstruction."""
    width = wires.width(wires.reads[0])
    found = build(
        Settings(wiring={"kind": "sae"}, features=2 * width, gate={"kind": "relu"}), wires, 0, Shards()
    ).eval()
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        for group in found.groups:
            group.W_enc.copy_(both)
            group.W_dec.copy_(both)
    return found


def zero(wires):
    found = make(wires)
    with torch.no_grad():
        for parameter in (*found.parameters(), found.write_mean):
            parameter.zero_()
    return found


def module(model, site):
    kind, layer = site.split(".")
    if model.hf.config.model_type == "gpt2":
        block = model.hf.transformer.h[int(layer)]
        return {"mlp": block.mlp, "attn": block.attn, "resid": block}[kind.split("_")[0]]
    block = model.hf.model.layers[int(layer)]
    if kind == "mlp_out" and model.hf.config.model_type == "gemma2":
        return block.post_feedforward_layernorm
    return {"mlp": block.mlp, "attn": block.self_attn, "resid": block}[kind.split("_")[0]]


def hooked_logits(model, windows, visits):
    """Plain PyTorch: `visits[site]` (value [n, context, d] → new value or None), placed with forward hooks."""
    tokens, length, _ = windows
    handles = []
    for site, visit in visits.items():
        if site.split(".")[0] in ("mlp_in", "resid_pre"):

            def before(_, args, kwargs, visit=visit):
                if args:
                    new = visit(args[0])
                    return None if new is None else ((new, *args[1:]), kwargs)
                new = visit(kwargs["hidden_states"])
                return None if new is None else (args, kwargs | {"hidden_states": new})

            handles.append(module(model, site).register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(_, args, out, visit=visit):
                new = visit(out[0] if isinstance(out, tuple) else out)
                return None if new is None else ((new, *out[1:]) if isinstance(out, tuple) else new)

            handles.append(module(model, site).register_forward_hook(after))
    attention = (torch.arange(tokens.shape[1]) < length[:, None]).long()
    with torch.no_grad():
        logits = model.hf(input_ids=tokens, attention_mask=attention, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def scores(logits, original, windows):
    """CE, KL and agreement by the definition: token by token."""
    tokens, length, keep = windows
    ce, kl, same = [], [], []
    for n in range(len(tokens)):
        for i in range(int(length[n]) - 1):
            if keep[n, i]:
                q, p = logits[n, i].double().log_softmax(0), original[n, i].double().log_softmax(0)
                ce.append(-q[tokens[n, i + 1]])
                kl.append((p.exp() * (p - q)).sum())
                same.append(float(q.argmax() == p.argmax()))
    return float(torch.stack(ce).mean()), float(torch.stack(kl).mean()), sum(same) / len(same)


def evaluate(dictionary, model, windows, per_batch=6):
    parts = zip(*(part.split(per_batch) for part in windows), strict=True)
    return evaluate_replacement(dictionary, model, [prepare(*part) for part in parts]).compute()


def put(value, keep, rows):
    new = value.clone()
    new[keep] = rows
    return new


def clt_by_hooks(dictionary, keep):
    """The cross-layer replacement model, from the weights: f_l of the modified stream, ŷ_l = Σ_{g ≤ l} f_g W_dec."""
    codes = {}

    def read(layer, value):
        mean, scale = (v.view(LAYERS, WIDTH)[layer] for v in (dictionary.read_mean, dictionary.read_scale))
        group = dictionary.groups[layer]
        codes[layer] = torch.relu((value[keep] - mean) / scale @ group.W_enc.T + group.b_enc)

    def write(layer, value):
        y = dictionary.b_dec.view(LAYERS, WIDTH)[layer].clone()
        for g in range(layer + 1):
            y = y + codes[g] @ dictionary.groups[g].W_dec.view(-1, LAYERS - g, WIDTH)[:, layer - g]
        scale, mean = (v.view(LAYERS, WIDTH)[layer] for v in (dictionary.write_scale, dictionary.write_mean))
        return put(value, keep, y * scale + mean)

    visits = {f"mlp_in.{n}": lambda v, n=n: read(n, v) for n in range(LAYERS)}
    return visits | {f"mlp_out.{n}": lambda v, n=n: write(n, v) for n in range(LAYERS)}


def test_scored_are_predictions_from_kept_positions_to_real_tokens():
    tokens = torch.tensor([[7, 8, 9, 5], [7, 8, 0, 0]])
    keep = torch.tensor([[False, True, True, True], [False, True, False, False]])
    batch = prepare(tokens, torch.tensor([4, 2]), keep)
    assert batch.scored.tolist() == [[False, True, True, False], [False] * 4]  # the last tokens have no successor
    assert batch.targets.tolist() == [9, 5]
    assert batch.attention.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_clt_equals_a_hook_implementation(model, windows):
    dictionary = make(wiring.clt(range(LAYERS), WIDTH))
    found = evaluate(dictionary, model, windows)
    keep = windows[2]
    original = hooked_logits(model, windows, {})
    ce, kl, same = scores(hooked_logits(model, windows, clt_by_hooks(dictionary, keep)), original, windows)
    zeros = {f"mlp_out.{n}": lambda v: v * ~keep[..., None] for n in range(LAYERS)}
    ablated, ablated_kl, _ = scores(hooked_logits(model, windows, zeros), original, windows)
    clean = scores(original, original, windows)[0]
    assert found["replacement_inputs"] == "modified"
    assert found["ce_original"] == pytest.approx(clean, abs=1e-5)
    assert found["all"] == pytest.approx(
        {
            "ce_replaced": ce,
            "ce_ablated": ablated,
            "ce_recovered": (ablated - ce) / (ablated - clean),
            "kl": kl,
            "kl_ablated": ablated_kl,
            "top1_agreement": same,
        },
        abs=1e-4,
    )
    assert found["tokens"] == int(sum((keep[n, : int(m) - 1]).sum() for n, m in enumerate(windows[1])))
    assert found["all"]["ce_replaced"] != pytest.approx(found["ce_original"], abs=0.1)


def test_one_site_at_a_time_uses_clean_features(model, windows):
    dictionary, keep = make(wiring.clt(range(LAYERS), WIDTH)), windows[2]
    rows = {}
    reads = {f"mlp_in.{n}": lambda v, n=n: rows.update({f"mlp_in.{n}": v[keep]}) for n in range(LAYERS)}
    original = hooked_logits(model, windows, reads)
    with torch.no_grad():
        rebuilt = dictionary.reconstruct(rows)
    found = evaluate(dictionary, model, windows)
    for site in ("mlp_out.0", "mlp_out.2"):
        alone = hooked_logits(model, windows, {site: lambda v, site=site: put(v, keep, rebuilt[site])})
        ce, kl, _ = scores(alone, original, windows)
        assert found["sites"][site]["ce_replaced"] == pytest.approx(ce, abs=1e-4)
        assert found["sites"][site]["kl"] == pytest.approx(kl, abs=1e-4)


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"])
def test_identity_changes_nothing(model, windows, kind):
    found = evaluate(identity(wiring.sae([f"{kind}.{n}" for n in range(LAYERS)], WIDTH)), model, windows)
    for scored in (found["all"], *found["sites"].values()):
        assert scored["ce_replaced"] == pytest.approx(found["ce_original"], abs=1e-4)
        assert scored["kl"] == pytest.approx(0, abs=1e-4)
        assert scored["top1_agreement"] == 1
        assert scored["ce_ablated"] != scored["ce_replaced"]
    assert found["all"]["ce_recovered"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("skip", [False, True])
def test_zero_is_zero_ablation(model, windows, skip):
    found = evaluate(zero(wiring.transcoders(range(LAYERS), WIDTH, skip=skip)), model, windows)
    for scored in (found["all"], *found["sites"].values()):
        assert scored["ce_replaced"] == pytest.approx(scored["ce_ablated"], abs=1e-6)
        assert scored["ce_recovered"] == pytest.approx(0, abs=1e-5)
        assert scored["kl"] == pytest.approx(scored["kl_ablated"], abs=1e-6)


def test_skip_transcoders_equal_hooks_on_the_modified_stream(model, windows):
    dictionary, keep = make(wiring.transcoders([0, 2], WIDTH, skip=True)), windows[2]
    stream = {}

    def write(g, site, value):
        with torch.no_grad():
            raw = {"mlp_in.0": stream["mlp_in.0"], "mlp_in.2": stream.get("mlp_in.2", stream["mlp_in.0"])}
            return put(value, keep, dictionary.reconstruct(raw)[site])

    visits = {f"mlp_in.{n}": lambda v, n=n: stream.update({f"mlp_in.{n}": v[keep]}) for n in (0, 2)}
    visits |= {f"mlp_out.{n}": lambda v, g=g, n=n: write(g, f"mlp_out.{n}", v) for g, n in enumerate((0, 2))}
    ce, _, _ = scores(hooked_logits(model, windows, visits), hooked_logits(model, windows, {}), windows)
    assert evaluate(dictionary, model, windows)["all"]["ce_replaced"] == pytest.approx(ce, abs=1e-4)


def test_masked_positions_keep_the_models_own_activations(model, windows):
    """Pitfalls 13 and 19: a BOS-like row, left out of the mask, is neither replaced nor scored."""
    tokens, length, keep = windows
    whole = torch.arange(24) < length[:, None]
    batch = prepare(tokens, length, keep)
    unmasked = prepare(tokens, length, whole)
    names = [f"mlp_out.{n}" for n in range(LAYERS)]
    first = torch.zeros_like(keep)
    first[:, 0] = True
    probe = type(batch)(batch.tokens, batch.attention, keep, first, tokens[first])
    assert torch.equal(forward(model, probe, ablate(names, keep)), forward(model, probe, {}))
    probe = type(batch)(batch.tokens, batch.attention, whole, first, tokens[first])
    assert not torch.allclose(forward(model, probe, ablate(names, whole)), forward(model, probe, {}), atol=0.1)
    assert unmasked.scored.sum() - batch.scored.sum() == 6 + 1  # six BOS and the one in the middle


def test_a_dictionary_that_is_wild_on_bos_scores_as_if_it_were_not(model, windows):
    """One feature fires on BOS rows alone, and then writes a huge vector."""
    tokens, length, keep = windows
    rows = {}
    whole = torch.arange(24) < length[:, None]
    hooked_logits(model, windows, {"mlp_out.0": lambda v: rows.update(bos=v[0, 0], rest=v[keep])})
    bos = rows["bos"]
    assert (rows["rest"] @ bos / bos.norm() ** 2).max() < 0.9
    tame, wild = (identity(wiring.sae(["mlp_out.0"], WIDTH)) for _ in range(2))
    group = wild.groups[0]
    extra = {"W_enc": bos[None] / bos.norm() ** 2, "b_enc": torch.tensor([-0.95]), "W_dec": 1e3 * bos[None]}
    for name, row in extra.items():
        setattr(group, name, torch.nn.Parameter(torch.cat([getattr(group, name).detach(), row])))
    assert evaluate(wild, model, windows)["all"] == pytest.approx(evaluate(tame, model, windows)["all"], abs=1e-5)
    assert evaluate(wild, model, (tokens, length, whole))["all"]["kl"] > 0.1


def test_metrics_are_over_tokens_not_batches(model, windows):
    dictionary = make(wiring.transcoders([1, 3], WIDTH, skip=False))
    whole, single = evaluate(dictionary, model, windows), evaluate(dictionary, model, windows, per_batch=2)
    assert single["all"] == pytest.approx(whole["all"], abs=1e-4)
    assert (single["tokens"], single["windows"]) == (whole["tokens"], whole["windows"]) == (whole["tokens"], 6)


def test_acausal_crosscoder_substitutes_clean_reconstructions(model, windows):
    sites = [f"resid_post.{n}" for n in range(LAYERS)]
    dictionary, keep = make(wiring.crosscoder(sites, WIDTH, "acausal")), windows[2]
    rows = {}
    original = hooked_logits(model, windows, {s: lambda v, s=s: rows.update({s: v[keep]}) for s in sites})
    with torch.no_grad():
        rebuilt = dictionary.reconstruct(rows)
    visits = {s: lambda v, s=s: put(v, keep, rebuilt[s]) for s in sites}
    ce, kl, _ = scores(hooked_logits(model, windows, visits), original, windows)
    found = evaluate(dictionary, model, windows)
    assert found["replacement_inputs"] == "clean"
    assert found["all"]["ce_replaced"] == pytest.approx(ce, abs=1e-4)
    assert found["all"]["kl"] == pytest.approx(kl, abs=1e-4)


def test_causal_crosscoders_read_the_modified_stream_before_writing_it(model, windows):
    sites = [f"resid_post.{n}" for n in range(LAYERS)]
    dictionary, keep = make(wiring.crosscoder(sites, WIDTH, "weak")), windows[2]
    codes = {}

    def visit(layer, value):
        site = sites[layer]
        with torch.no_grad():
            codes[layer] = dictionary.encode_group(layer, {site: value[keep]})
            return put(value, keep, dictionary.decode_site(site, codes, {}))

    visits = {s: lambda v, n=n: visit(n, v) for n, s in enumerate(sites)}
    ce, _, _ = scores(hooked_logits(model, windows, visits), hooked_logits(model, windows, {}), windows)
    assert evaluate(dictionary, model, windows)["all"]["ce_replaced"] == pytest.approx(ce, abs=1e-4)


def test_which_wirings_can_be_computed_in_the_modified_stream():
    sites = [f"resid_post.{n}" for n in range(3)]
    for possible in (
        wiring.sae(sites, 4),
        wiring.clt([1, 3], 4),
        wiring.transcoders([0, 1], 4, skip=True),
        wiring.crosscoder(sites, 4, "weak"),
        wiring.crosscoder(sites, 4, "strict"),
    ):
        assert replaceable_in_place(possible)
    assert not replaceable_in_place(wiring.crosscoder(sites, 4, "acausal"))
    backwards = wiring.Wiring({"mlp_in.1": 4, "mlp_out.1": 4}, (("mlp_out.1",),), (("mlp_in.1",),))
    assert not replaceable_in_place(backwards)


def family(tmp_path, build_model):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    build_model(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return LanguageModel(Model(name=str(tmp_path)))


def small(config, vocabulary):
    return config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "architecture"), [(LlamaConfig, LlamaForCausalLM), (Gemma2Config, Gemma2ForCausalLM)]
)
def test_other_families_equal_hooks_too(tmp_path, windows, config, architecture):
    model = family(tmp_path, lambda vocabulary: architecture(small(config, vocabulary)))
    dictionary, keep = make(wiring.clt(range(LAYERS), WIDTH)), windows[2]
    original = hooked_logits(model, windows, {})
    ce, kl, _ = scores(hooked_logits(model, windows, clt_by_hooks(dictionary, keep)), original, windows)
    found = evaluate(dictionary, model, windows)
    assert found["all"]["ce_replaced"] == pytest.approx(ce, rel=1e-4)
    assert found["all"]["kl"] == pytest.approx(kl, rel=1e-3)
    same = evaluate(identity(wiring.sae(["attn_out.1", "resid_pre.2"], WIDTH)), model, windows)
    assert same["all"]["kl"] == pytest.approx(0, abs=1e-4)


def test_divergence_ignores_tokens_the_model_rules_out():
    logits = torch.randn(5, 9)
    logits[:, 3] = -torch.inf
    changed = logits + torch.randn(5, 9)
    found = Score()
    found.update(changed, logits, torch.tensor([0, 1, 2, 4, 5]))
    keep = torch.arange(9) != 3
    p, q = logits[:, keep].log_softmax(1), changed[:, keep].log_softmax(1)
    assert found.divergence == pytest.approx(float(nnf.kl_div(q, p, log_target=True, reduction="sum")), rel=1e-4)


def test_nothing_to_score_is_an_error_of_one_line(model, windows):
    tokens, length, keep = windows
    with pytest.raises(UserError, match=r"evaluate\.windows: no held-out token can be scored"):
        evaluate(make(wiring.sae(["mlp_out.0"], WIDTH)), model, (tokens, length, keep & False))
