"""The whole export of a trained run: known answers, the command line, the model card, the Hub."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import xlc_ray as xlc
from tests.activations.build import make as make_store
from tests.export import make
from tests.export.hub_server import TOKEN, serve
from tests.runs import SITES, small_run_in
from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.export import golden, hub
from xlc_ray.export.run import export
from xlc_ray.training import train_alone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a trained CLT with a store, its held-out rows, and an evaluation."""
    path = tmp_path_factory.mktemp("trained")
    config = small_run_in(path)()
    train_alone(config)
    make_store(path / "store" / "held_out", [40], sites=SITES)
    files.write_json(f"{config.out}/eval.json", {"explained_variance": 0.875, "l0": 2.5, "kl": None, "tokens": 40})
    return config.out


def read_golden(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path / golden.FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_known_answers_are_those_of_the_run(tmp_path, run):
    said = export(run, "circuit_tracer", str(tmp_path / "out"), None)
    assert said.startswith("circuit_tracer: 2 x 24 features of clt in ")
    assert said.endswith("golden.safetensors: 32 held-out rows")
    known, facts = read_golden(tmp_path / "out")
    assert {name: tuple(t.shape) for name, t in known.items()} == {
        "inputs": (2, 32, 6),
        "features": (2, 32, 24),
        "outputs": (2, 32, 6),
    }
    assert facts == {"inputs": "mlp_in.0 mlp_in.1", "outputs": "mlp_out.0 mlp_out.1", "rows": "held-out rows"}
    assert known["inputs"][1, :, 1].tolist() == list(range(32))  # rows of the store, whose second column numbers them
    dictionary = checkpoint.load_dictionary(run)[0]
    batch = {f"mlp_in.{n}": known["inputs"][n] for n in range(2)}
    assert 0 < (known["features"] != 0).sum() < known["features"].numel()
    for n, f in enumerate(make.codes(dictionary, batch)):
        make.alike(known["features"][n], f)
    for n, (_, value) in enumerate(dictionary.reconstruct(batch).items()):
        make.alike(known["outputs"][n], value)
    assert torch.equal(make.codes(xlc.load(str(tmp_path / "out")), batch)[1], known["features"][1])


def test_saelens_gets_the_densities_of_an_evaluated_run(tmp_path):
    config = small_run_in(tmp_path)({"dictionary.wiring": {"kind": "transcoder"}, "dictionary.gate": {"kind": "relu"}})
    train_alone(config.override({"train.steps": 1}))
    density = np.linspace(0, 1, 48)
    table = pa.table({"group": np.repeat([0, 1], 24), "feature": np.tile(np.arange(24), 2), "density": density})
    pq.write_table(table, f"{config.out}/features.parquet")
    export(config.out, "saelens", str(tmp_path / "out"), None)
    for g, folder in enumerate(("mlp_in.0", "mlp_in.1")):
        logs = load_file(tmp_path / "out" / folder / "sparsity.safetensors")["sparsity"]
        make.alike(10**logs, torch.from_numpy(density[24 * g : 24 * g + 24]))
    assert logs[-1].item() == pytest.approx(0, abs=1e-6)
    assert load_file(tmp_path / "out" / "mlp_in.0" / "sparsity.safetensors")["sparsity"][0] == -10
    assert xlc.load(str(tmp_path / "out")).wiring.groups == 2


def test_load_knows_the_run_itself(run):
    loaded, dictionary = xlc.load(run), checkpoint.load_dictionary(run)[0]
    assert not loaded.training
    assert all(torch.equal(value, dictionary.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_known_answers_are_of_the_held_out_rows_of_another_programs_store_too(tmp_path, run):
    config = small_run_in(tmp_path)()
    make_store(tmp_path / "store" / "held_out", [40], sites=SITES)
    (tmp_path / "store/held_out/manifest.json").unlink()  # index.bin stays
    assert golden.rows(checkpoint.load_dictionary(run)[0], config).origin == "held-out rows"


def test_without_a_store_known_answers_are_of_gaussian_rows_in_the_sites_scale():
    dictionary, batch = make.trained("acausal", "relu")
    found = golden.rows(dictionary, make.config("acausal", "relu"))
    again = golden.rows(dictionary, make.config("acausal", "relu"))
    assert found.origin == "Gaussian rows"
    assert list(found.values) == list(dictionary.wiring.read_sites)
    for site, value in found.values.items():
        assert torch.equal(value, again.values[site])
        spread = batch[site].std(dim=0) if dictionary.read_mean.any() else batch[site].norm(dim=1).mean() / 6**0.5
        assert (value.std(dim=0) / spread).log().abs().max() < 1


def test_card_says_how_to_load_what_was_measured_and_no_local_path(tmp_path, run):
    export(run, "circuit_tracer", str(tmp_path / "out"), None)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "circuit_tracer", "tags": ["sparse-dictionary", "clt", "xlc_ray"]}
    assert 'load_transcoder_from_hub("user/name")' in card
    assert "| `explained_variance` | 0.875 |" in card
    assert "kl" not in card.split("## Settings")[0]
    assert "kind: batchtopk" in card
    assert str(Path(run).parent) not in card
    config = make.config("saes", "relu")
    dictionary, _ = make.trained("saes", "relu")
    other = hub.card(dictionary, config, "saelens", None, "me/saes")
    assert yaml.safe_load(other.split("---")[1])["base_model"] == "openai-community/gpt2"
    assert 'folder = snapshot_download("me/saes") + "/resid_post.0"\nsae = SAE.load_from_disk(folder)\n' in other
    crosscoder, _ = make.trained("acausal", "relu")
    last = hub.card(crosscoder, make.config("acausal", "relu"), "dictionary_learning", None, "me/cc")
    assert 'snapshot_download("me/cc") + ""\nweights = torch.load(f"{folder}/cc_weights.pt")' in last
    local = hub.card(dictionary, config.override({"model.name": "/home/me/gpt2"}), "saelens", None, None)
    assert "/home" not in local


def test_mistakes_are_one_line(tmp_path, run):
    with pytest.raises(UserError, match="--format sae-lens: unknown; did you mean saelens"):
        export(run, "sae-lens", str(tmp_path / "out"), None)
    with pytest.raises(UserError, match=r"--format saelens: has no place for the wiring clt; .* use circuit_tracer"):
        export(run, "saelens", str(tmp_path / "out"), None)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(str(tmp_path), "saelens", str(tmp_path / "out"), None)
    with pytest.raises(UserError, match="memory://x is a URL; give a local --out"):
        export(run, "circuit_tracer", "memory://x", "me/clt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "layer_9.safetensors").touch()
    with pytest.raises(UserError, match=r"holds layer_9\.safetensors already; give a new directory"):
        export(run, "circuit_tracer", str(tmp_path), None)


def in_hub(address: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, since huggingface_hub reads the environment when it is imported."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    own = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], env=plain | own, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_job_pushes_every_file_to_the_hub(tmp_path, run):
    with serve() as server:
        done = in_hub(
            server.address,
            *("jobs/export.py", "--run", run, "--format", "circuit_tracer"),
            *(f"--out={tmp_path / 'out'}", "--push-to-hub", "me/clt"),
            HF_TOKEN=TOKEN,
            HF_HOME=str(tmp_path / "home"),
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("pushed: ")
    assert server.repository == "me/clt"
    there = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"config.yaml", "README.md", "golden.safetensors", "W_dec_0.safetensors"} <= set(there)
    assert server.files == there
    assert 'load_transcoder_from_hub("me/clt")' in there["README.md"].decode()


REFUSALS = """
import os, sys
import huggingface_hub
from xlc_ray.export import hub
def ask(repo, token):
    os.environ.pop("HF_TOKEN", None)
    if token: os.environ["HF_TOKEN"] = token
    try: hub.check(repo)
    except ValueError as error: print(error)
ask("me/clt", "hf_other")
ask("me/clt", None)
ask("me/a/b", sys.argv[1])
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"
ask("me/clt", sys.argv[1])
"""


def test_what_the_hub_refuses_is_one_line(tmp_path):
    with serve() as server:
        done = in_hub(server.address, "-c", REFUSALS, TOKEN, HF_HOME=str(tmp_path))
    said = done.stdout.splitlines()
    assert len(said) == 4, done.stderr
    assert said[0].startswith("--push-to-hub me/clt: the Hub answered 401: Invalid")
    assert said[1].startswith("--push-to-hub me/clt: needs a token; log in with `hf auth login`")
    assert said[2].startswith("--push-to-hub me/a/b: not the name of a repository; write user/name")
    assert said[3].startswith("--push-to-hub me/clt: the Hub cannot be reached")


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("eval.json", "{", "circuit_tracer"),
        ("eval.json", '{"l0": 2.5}', "circuit_tracer"),
        ("features.parquet", "PAR1", "saelens"),
        ("store/held_out/manifest.json", "{", "circuit_tracer"),
    ],
)
def test_a_damaged_file_of_the_run_stops_before_anything_is_written(tmp_path, name, content, form):
    wired = {"dictionary.wiring": {"kind": "transcoder"}, "dictionary.gate": {"kind": "relu"}}
    config = small_run_in(tmp_path)({**wired, "train.steps": 1})
    train_alone(config)
    make_store(tmp_path / "store" / "held_out", [40], sites=SITES)
    damaged = tmp_path / name if "/" in name else Path(config.out) / name
    damaged.write_text(content)
    with pytest.raises(UserError, match=f"{name}: (not JSON|tokens is None|cannot be read as .parquet)"):
        export(config.out, form, str(tmp_path / "out"), None)
    assert not (tmp_path / "out").exists()


def test_without_the_hub_nothing_is_written(tmp_path, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="--push-to-hub me/clt: HF_HUB_OFFLINE is set"):  # as in all our tests
        export(run, "circuit_tracer", str(tmp_path / "out"), "me/clt")
    assert not (tmp_path / "out").exists()


def test_help_names_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs/export.py", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "jobs/export.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert all(word in said for word in ("--run DIR", "--format", "--push-to-hub", "saelens", "known answers"))


def test_eval_json_without_numbers_is_no_hindrance():
    dictionary, _ = make.trained("clt", "relu")
    text = hub.card(dictionary, make.config("clt", "relu"), "circuit_tracer", json.loads('{"tokens": 5}'), None)
    assert "On 5 held-out tokens" in text
