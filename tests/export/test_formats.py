"""Out and in again: equal features and reconstructions, detection, and what a format cannot express."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import xlc_ray as xlc
from tests.dictionary.make import dictionary as random_dictionary
from tests.export import make
from xlc_ray.config import UserError
from xlc_ray.dictionary import gates
from xlc_ray.export import formats
from xlc_ray.export.plain import plain

THRESHOLDED = ("jumprelu", "jumprelu_direct", "batchtopk", "batchtopk_by_norm", "batchtopk_group", "topk_shared")
SAE_GATES = [("sae", gate) for gate in make.GATES if gate != "topk_shared"] + [("saes", gate) for gate in make.GATES]
CASES = [
    *(("circuit_tracer", wired, gate) for wired in ("clt", "transcoder", "skip") for gate in ("relu", *THRESHOLDED)),
    *(("saelens", *case) for case in SAE_GATES),
    *(("saelens", wired, gate) for wired in ("transcoder", "skip") for gate in ("relu", *THRESHOLDED)),
    ("saelens", "sae_skip", "relu"),
    *(("dictionary_learning", *case) for case in SAE_GATES),
    ("dictionary_learning", "acausal", "relu"),
]


@pytest.mark.parametrize(("form", "wired", "gate"), CASES)
def test_out_and_in_again_is_the_same_dictionary(tmp_path, form, wired, gate):
    dictionary, batch = make.trained(wired, gate)
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    written = formats.WRITERS[form](dictionary, make.config(wired, gate), str(tmp_path / "x"))
    assert formats.detect(str(tmp_path / "x")) == form
    loaded = xlc.load(str(tmp_path / "x"))
    assert not loaded.training
    assert loaded.wiring == dictionary.wiring
    assert list(loaded.wiring.widths) == list(dictionary.wiring.widths)
    scaled = gate == "topk_by_norm" or (form, gate, wired[:3]) == ("dictionary_learning", "relu", "sae")
    make.same(loaded, dictionary, batch, scaled)
    for got, want in zip(make.codes(loaded, batch), make.codes(written, batch), strict=True):
        make.alike(got, want)
    assert all(torch.equal(value, before[name]) for name, value in dictionary.state_dict().items())


@pytest.mark.parametrize("normalization", ["none", "rms", "unit", "mean_norm", "mean_std"])
def test_every_normalisation_is_folded(tmp_path, normalization):
    dictionary, batch = make.trained("clt", "batchtopk", normalization)
    formats.WRITERS["circuit_tracer"](dictionary, make.config("clt", "batchtopk"), str(tmp_path))
    make.same(xlc.load(str(tmp_path)), dictionary, batch)


def test_circuit_tracers_layout_by_hand(tmp_path):
    dictionary, batch = make.trained("clt", "jumprelu")
    formats.WRITERS["circuit_tracer"](dictionary, make.config("clt", "jumprelu"), str(tmp_path))
    want = dictionary.reconstruct(batch)
    totals = [torch.zeros(50, make.WIDTH, dtype=torch.float64) for _ in range(make.LAYERS)]
    for n in range(make.LAYERS):
        encoder = {k: v.double() for k, v in load_file(tmp_path / f"W_enc_{n}.safetensors").items()}
        decoder = load_file(tmp_path / f"W_dec_{n}.safetensors")[f"W_dec_{n}"].double()
        assert set(encoder) == {f"{name}_{n}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        assert decoder.shape == (7, make.LAYERS - n, make.WIDTH)
        pre = batch[f"mlp_in.{n}"] @ encoder[f"W_enc_{n}"].T + encoder[f"b_enc_{n}"]
        f = pre * (pre > encoder[f"threshold_{n}"])
        totals[n] += encoder[f"b_dec_{n}"]
        for t in range(n, make.LAYERS):
            totals[t] += f @ decoder[:, t - n]
    for t, total in enumerate(totals):
        make.alike(total, want[f"mlp_out.{t}"])
    facts = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert facts == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "openai-community/gpt2",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": None,
    }


def test_saelens_facts(tmp_path):
    dictionary, _ = make.trained("transcoder", "batchtopk")
    formats.WRITERS["saelens"](dictionary, make.config("transcoder", "batchtopk"), str(tmp_path))
    facts = json.loads((tmp_path / "mlp_in.2" / "cfg.json").read_text())
    metadata = facts.pop("metadata")
    assert (facts["architecture"], facts["d_in"], facts["d_out"], facts["d_sae"]) == ("jumprelu_transcoder", 6, 6, 7)
    assert (facts["apply_b_dec_to_input"], facts["normalize_activations"]) == (False, "none")
    assert metadata["hook_name"] == "blocks.2.mlp.hook_in"
    assert metadata["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert (metadata["context_size"], metadata["prepend_bos"]) == (48, True)
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        ("relu", "AutoEncoder"),
        ("gated", "GatedAutoEncoder"),
        ("topk", "AutoEncoderTopK"),
        ("batchtopk", "BatchTopKSAE"),
        ("jumprelu", "JumpReluAutoEncoder"),
        ("batchtopk_by_norm", "JumpReluAutoEncoder"),
    ],
)
def test_dictionary_learnings_classes(tmp_path, gate, kind):
    dictionary, _ = make.trained("sae", gate)
    formats.WRITERS["dictionary_learning"](dictionary, make.config("sae", gate), str(tmp_path))
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == kind
    assert (trainer["layer"], trainer["submodule_name"]) == (1, "resid_post_layer_1")
    assert (trainer["activation_dim"], trainer["dict_size"]) == (6, 7)
    loaded = xlc.load(str(tmp_path))
    if kind == "BatchTopKSAE":
        assert isinstance(loaded.gate, gates.TopK)
        assert (loaded.gate.k, loaded.gate.over_batch, trainer["k"]) == (3, True, 3)
    if kind == "AutoEncoder":
        columns = torch.load(tmp_path / "ae.pt", weights_only=True)["decoder.weight"]
        torch.testing.assert_close(columns.norm(dim=0), torch.ones(7))


def test_gated_by_hand_in_both_layouts(tmp_path):
    dictionary, batch = make.trained("sae", "gated")
    want, x = make.codes(dictionary, batch)[0], batch["resid_post.1"]
    for form in ("saelens", "dictionary_learning"):
        formats.WRITERS[form](dictionary, make.config("sae", "gated"), str(tmp_path / form))
    s = {k: v.double() for k, v in load_file(tmp_path / "saelens" / "sae_weights.safetensors").items()}
    assert set(s) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    shared = x @ s["W_enc"]
    make.alike((shared + s["b_gate"] > 0) * (s["r_mag"].exp() * shared + s["b_mag"]).relu(), want)
    d = {k: v.double() for k, v in torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True).items()}
    assert set(d) == {"decoder_bias", "gate_bias", "r_mag", "mag_bias", "encoder.weight", "decoder.weight"}
    shared = (x - d["decoder_bias"]) @ d["encoder.weight"].T
    make.alike((shared + d["gate_bias"] > 0) * (d["r_mag"].exp() * shared + d["mag_bias"]).relu(), want)


def test_matryoshka_dictionaries_of_dictionary_learning_are_read(tmp_path):
    dictionary, batch = make.trained("sae", "batchtopk")
    formats.WRITERS["dictionary_learning"](dictionary, make.config("sae", "batchtopk"), str(tmp_path))
    own = torch.load(tmp_path / "ae.pt", weights_only=True)
    names = {"W_enc": own["encoder.weight"].T, "b_enc": own["encoder.bias"], "W_dec": own["decoder.weight"].T}
    kept = {name: own[name] for name in ("b_dec", "k", "threshold")}
    torch.save({**names, **kept, "group_sizes": torch.tensor([2, 5])}, tmp_path / "ae.pt")
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["trainer"]["dict_class"] = "MatryoshkaBatchTopKSAE"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    make.same(xlc.load(str(tmp_path)), dictionary, batch)


def test_a_decoder_row_of_zeros_stays_silent_as_a_unit_column(tmp_path):
    dictionary, batch = make.trained("sae", "relu")
    dictionary.groups[0].W_dec.data[2] = 0
    formats.WRITERS["dictionary_learning"](dictionary, make.config("sae", "relu"), str(tmp_path))
    loaded = xlc.load(str(tmp_path))
    assert not make.codes(loaded, batch)[0][:, 2].any()
    make.alike(loaded.reconstruct({k: v.float() for k, v in batch.items()})["resid_post.1"],
               dictionary.reconstruct(batch)["resid_post.1"])  # fmt: skip


REFUSED = [
    ("circuit_tracer", "sae", "relu", "wiring sae.*use saelens"),
    ("circuit_tracer", "weak", "relu", "wiring crosscoder.*clt and transcoder"),
    ("circuit_tracer", "strict", "relu", "wiring crosscoder"),
    ("circuit_tracer", "acausal", "relu", "dictionary_learning for acausal"),
    ("circuit_tracer", "clt_skip", "relu", "skip connections of a clt.*skip: false"),
    ("circuit_tracer", "clt", "gated", "no place for gated.*xlc_ray.load"),
    ("circuit_tracer", "clt", "topk", "no place for topk.*jobs/convert.py"),
    ("saelens", "clt", "relu", "wiring clt.*use circuit_tracer"),
    ("saelens", "acausal", "relu", "wiring crosscoder.*dictionary_learning"),
    ("saelens", "transcoder", "topk", "transcoders with topk; convert"),
    ("saelens", "transcoder", "gated", "transcoders with gated; the run itself loads"),
    ("dictionary_learning", "sae_skip", "relu", "skip connections; use saelens"),
    ("dictionary_learning", "clt", "relu", "wiring clt.*use circuit_tracer"),
    ("dictionary_learning", "strict", "relu", r"wiring crosscoder \(strict\)"),
    ("dictionary_learning", "acausal", "batchtopk", "crosscoders with batchtopk.*xlc_ray.load"),
]


@pytest.mark.parametrize(("form", "wired", "gate", "message"), REFUSED)
def test_what_a_format_cannot_express_is_one_line_with_the_alternative(tmp_path, form, wired, gate, message):
    dictionary, _ = make.trained(wired, gate)
    with pytest.raises(UserError, match=message) as error:
        formats.WRITERS[form](dictionary, make.config(wired, gate), str(tmp_path / "x"))
    assert str(error.value).startswith(f"--format {form}: has no place for")
    assert not (tmp_path / "x").exists()


def test_circuit_tracer_needs_every_layer(tmp_path):
    dictionary, _ = make.trained("transcoder", "relu")
    object.__setattr__(dictionary, "wiring", make.wiring.transcoders([0, 2, 3], make.WIDTH, skip=False))
    with pytest.raises(UserError, match=r"layers \[0, 2, 3\] alone.*layers: all"):
        formats.WRITERS["circuit_tracer"](dictionary, make.config("transcoder", "relu"), str(tmp_path))


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"kind": "gated_hard_concrete"}, "no format here has the gate GatedHardConcrete"),
        ({"kind": "hard_concrete"}, "no format here has the gate HardConcrete"),
        ({"kind": "batchtopk", "k": 3, "rank_by": "zscore"}, "no format here ranks by z-scores"),
    ],
    ids=str,
)
def test_gates_without_a_format_are_refused(gate, message):
    with pytest.raises(UserError, match=message):
        plain(random_dictionary(make.WIRINGS["clt"], gate))


def test_a_directory_of_nothing_known_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"x: no dictionary: it is empty or not there; known: a run directory, circuit_tr"
    ):
        xlc.load(str(tmp_path / "x"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no dictionary: it holds notes\.txt"):
        xlc.load(str(tmp_path))


def test_damage_is_named(tmp_path):
    dictionary, _ = make.trained("clt", "jumprelu")
    formats.WRITERS["circuit_tracer"](dictionary, make.config("clt", "jumprelu"), str(tmp_path))
    tensors = load_file(tmp_path / "W_enc_1.safetensors")
    save_file({k: v for k, v in tensors.items() if "threshold" not in k}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(UserError, match="2 of 3 layers have thresholds"):
        xlc.load(str(tmp_path))
    save_file({**tensors, "b_enc_1": torch.zeros(5)}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(UserError, match=r"W_enc of group 1 is \[7, 6\], but \[5, 6\]"):
        xlc.load(str(tmp_path))
    save_file({"b_enc_1": torch.zeros(5)}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(UserError, match=r"W_enc_1\.safetensors: has no tensor W_enc_1; it has: b_enc_1"):
        xlc.load(str(tmp_path))
    (tmp_path / "W_enc_1.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"W_enc_1\.safetensors: cannot be read"):
        xlc.load(str(tmp_path))


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("saelens", "sae_weights.safetensors"),
        ("saelens", "cfg.json"),
        ("dictionary_learning", "ae.pt"),
        ("dictionary_learning", "config.json"),
    ],
)
def test_a_folder_of_which_a_part_is_missing_is_named(tmp_path, form, name):
    dictionary, _ = make.trained("saes", "relu")
    formats.WRITERS[form](dictionary, make.config("saes", "relu"), str(tmp_path))
    (tmp_path / "resid_post.0" / name).unlink()
    with pytest.raises(UserError, match=rf"resid_post\.0/{name}: missing"):
        xlc.load(str(tmp_path))


def test_a_topk_of_circuit_tracer_is_refused(tmp_path):
    dictionary, batch = make.trained("transcoder", "jumprelu")
    formats.WRITERS["circuit_tracer"](dictionary, make.config("transcoder", "jumprelu"), str(tmp_path))
    facts, layer = (tmp_path / "config.yaml").read_text(), load_file(tmp_path / "layer_1.safetensors")
    for change, message in (
        ("activation: topk", r"config\.yaml: activation 'topk' has no gate here; allowed: relu, jumprelu"),
        ("activation: gelu", r"config\.yaml: activation 'gelu' has no gate"),
        ("k: 2", r"config\.yaml: k of a topk, which keeps negative values too, has no gate here"),
    ):
        (tmp_path / "config.yaml").write_text(f"{facts}{change}\n")
        with pytest.raises(UserError, match=message):
            xlc.load(str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"{facts}activation: jump_relu\nk: null\n")
    make.same(xlc.load(str(tmp_path)), dictionary, batch)
    save_file({**layer, "k": torch.tensor(2)}, tmp_path / "layer_1.safetensors")
    with pytest.raises(UserError, match=r"layer_1\.safetensors: k of a topk"):
        xlc.load(str(tmp_path))


@pytest.mark.parametrize("k", [None, "3", 0, 2.5])
def test_a_topk_of_saelens_without_its_k_is_named(tmp_path, k):
    dictionary, _ = make.trained("sae", "topk")
    formats.WRITERS["saelens"](dictionary, make.config("sae", "topk"), str(tmp_path))
    facts = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(facts | {"k": k}))
    with pytest.raises(UserError, match=rf"cfg\.json: architecture topk with k {k!r}; allowed: an integer from 1 on"):
        xlc.load(str(tmp_path))


@pytest.mark.parametrize("name", ["b_dec", "b_enc"])
@pytest.mark.parametrize("form", ["saelens", "dictionary_learning"])
def test_biases_that_do_not_fit_are_named_where_inputs_are_centred(tmp_path, form, name):
    dictionary, _ = make.trained("sae", "topk")
    formats.WRITERS[form](dictionary, make.config("sae", "topk"), str(tmp_path))
    wrong = {name if form == "saelens" or name == "b_dec" else "encoder.bias": torch.zeros(5)}
    if form == "saelens":
        facts = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(facts | {"apply_b_dec_to_input": True}))
        save_file(load_file(tmp_path / "sae_weights.safetensors") | wrong, tmp_path / "sae_weights.safetensors")
    else:
        torch.save(torch.load(tmp_path / "ae.pt", weights_only=True) | wrong, tmp_path / "ae.pt")
    fits = {"b_dec": 6, "b_enc": 7}[name]
    with pytest.raises(UserError, match=rf"(sae_weights|ae)\..*: {name} is \[5\], but \[{fits}\] is what fits"):
        xlc.load(str(tmp_path))


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning"])
def test_decoders_that_do_not_fit_are_named_where_their_rows_are_made_unit_ones(tmp_path, form):
    dictionary, _ = make.trained("sae", "relu")
    formats.WRITERS[form](dictionary, make.config("sae", "relu"), str(tmp_path))
    if form == "saelens":
        facts = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(facts | {"rescale_acts_by_decoder_norm": True}))
        file, wrong = tmp_path / "sae_weights.safetensors", {"W_dec": torch.ones(5, 6)}
        save_file(load_file(file) | wrong, file)
    else:
        torch.save(
            torch.load(tmp_path / "ae.pt", weights_only=True) | {"decoder.weight": torch.ones(6, 5)}, tmp_path / "ae.pt"
        )
    with pytest.raises(UserError, match=r"(sae_weights|ae)\..*: W_dec is \[5, 6\], but \[7, 6\] is what fits the rest"):
        xlc.load(str(tmp_path))


def test_unknown_architectures_and_normalisations_of_saelens_are_named(tmp_path):
    dictionary, _ = make.trained("sae", "relu")
    formats.WRITERS["saelens"](dictionary, make.config("sae", "relu"), str(tmp_path))
    facts = json.loads((tmp_path / "cfg.json").read_text())
    for change, message in (
        ({"architecture": "temporal"}, "architecture 'temporal' has no gate here; allowed: standard"),
        ({"normalize_activations": "layer_norm"}, "layer_norm is not linear"),
        ({"metadata": None}, "before 6.0"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=message):
            xlc.load(str(tmp_path))


def test_saelens_conventions_that_we_do_not_write_are_read(tmp_path):
    dictionary, batch = make.trained("sae", "topk")
    written = formats.WRITERS["saelens"](dictionary, make.config("sae", "topk"), str(tmp_path))
    facts = json.loads((tmp_path / "cfg.json").read_text())
    changed = {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True, "k": 3}
    (tmp_path / "cfg.json").write_text(json.dumps(facts | changed))
    group, x = written.groups[0], batch["resid_post.1"]
    norms = group.W_dec.norm(dim=1)
    pre = ((x - written.b_dec) @ group.W_enc.T + group.b_enc) * norms
    top = pre.topk(3, dim=1)
    want = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    loaded = xlc.load(str(tmp_path))
    make.alike(make.codes(loaded, batch)[0], want)
    make.alike(loaded.reconstruct({"resid_post.1": x.float()})["resid_post.1"],
               (want / norms) @ group.W_dec + written.b_dec)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["saelens", "dictionary_learning"])
def test_half_precision_is_widened_before_any_arithmetic(tmp_path, form, dtype):
    dictionary, batch = make.trained("sae", "relu")
    formats.WRITERS[form](dictionary, make.config("sae", "relu"), str(tmp_path))
    if form == "saelens":
        name, names, save = "sae_weights.safetensors", ("W_enc", "b_enc", "W_dec", "b_dec"), save_file
        facts = json.loads((tmp_path / "cfg.json").read_text())
        facts |= {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True}
        (tmp_path / "cfg.json").write_text(json.dumps(facts))
    else:
        name, names, save = "ae.pt", ("encoder.weight", "encoder.bias", "decoder.weight", "bias"), torch.save
    read = load_file if form == "saelens" else torch.load
    half = {key: value.to(dtype) for key, value in read(tmp_path / name).items()}
    save(half, tmp_path / name)
    W_enc, b_enc, W_dec, b_dec = (half[key].double() for key in names)
    W_enc, W_dec = (W_enc, W_dec) if form == "saelens" else (W_enc.T, W_dec.T)
    norms = W_dec.norm(dim=1)
    want = ((batch["resid_post.1"] - b_dec) @ W_enc + b_enc).relu() * norms
    loaded = xlc.load(str(tmp_path))
    make.alike(make.codes(loaded, batch)[0], want, 1e-6)
    got = loaded.reconstruct({site: value.float() for site, value in batch.items()})["resid_post.1"]
    make.alike(got, (want / norms) @ W_dec + b_dec, 1e-6)


def test_hooks_that_are_none_of_our_sites_keep_their_names(tmp_path):
    dictionary, batch = make.trained("sae", "relu")
    formats.WRITERS["saelens"](dictionary, make.config("sae", "relu"), str(tmp_path))
    facts = json.loads((tmp_path / "cfg.json").read_text())
    facts["metadata"]["hook_name"] = "blocks.4.attn.hook_z"
    (tmp_path / "cfg.json").write_text(json.dumps(facts))
    loaded = xlc.load(str(tmp_path))
    assert loaded.wiring.sites == ("blocks.4.attn.hook_z",)
    make.alike(loaded.reconstruct({"blocks.4.attn.hook_z": batch["resid_post.1"].float()})["blocks.4.attn.hook_z"],
               dictionary.reconstruct(batch)["resid_post.1"])  # fmt: skip


@pytest.mark.parametrize("form", ["saelens", "circuit_tracer"])
def test_what_comes_before_the_gain_of_a_norm_is_not_taken_for_what_the_mlp_reads(tmp_path, form):
    dictionary, _ = make.trained("transcoder", "jumprelu")
    formats.WRITERS[form](dictionary, make.config("transcoder", "jumprelu"), str(tmp_path))
    for path in [tmp_path / "config.yaml"] if form == "circuit_tracer" else tmp_path.glob("*/cfg.json"):
        path.write_text(path.read_text().replace("mlp.hook_in", "ln2.hook_normalized"))
    wired = xlc.load(str(tmp_path)).wiring
    assert set(wired.reads) == {(f"blocks.{n}.ln2.hook_normalized",) for n in range(make.LAYERS)}
    assert set(wired.writes) == {(f"mlp_out.{n}",) for n in range(make.LAYERS)}


def test_folders_of_hooks_that_keep_their_names_are_in_the_order_of_layers(tmp_path):
    dictionary, _ = make.trained("transcoder", "relu")
    formats.WRITERS["saelens"](dictionary, make.config("transcoder", "relu"), str(tmp_path))
    for path in tmp_path.glob("*/cfg.json"):
        path.write_text(path.read_text().replace("mlp.hook_in", "attn.hook_z").replace("blocks.1.", "blocks.11."))
    assert xlc.load(str(tmp_path)).wiring.reads == tuple((f"blocks.{n}.attn.hook_z",) for n in (0, 2, 11))


def test_at_a_url(tmp_path):
    dictionary, batch = make.trained("clt", "jumprelu")
    formats.WRITERS["circuit_tracer"](dictionary, make.config("clt", "jumprelu"), "memory://exports/clt")
    make.same(xlc.load("memory://exports/clt"), dictionary, batch)
