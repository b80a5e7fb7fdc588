"""Generation from a mixture of text, chats and token ids; the job that prepares text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.activations.build import CHAT_TEMPLATE
from tests.activations.test_medical import MEDMCQA, MEDMCQA_TEXT, MEDQA, MEDQA_TEXT
from tests.cluster.test_generate import SITES, assert_equals_in_process_harvest, contents
from xlc_ray.activations import store
from xlc_ray.activations.text import load_documents, load_tokenizer
from xlc_ray.cluster import plan
from xlc_ray.cluster.generate import generate
from xlc_ray.config import Text, UserError

ROOT = Path(__file__).parents[2]


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path, tiny_config, asset, monkeypatch):
    """A tenth chats, some token ids, mostly novels, each document a window, for a model that knows chats."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(asset("tiny-austen-gpt2-d64"), model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    chats = [
        [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "No."}] for i in range(90)
    ]
    ids = [list(range(i + 1, i + 40)) for i in range(90)]
    parts = [
        {"dataset": asset("austen.txt"), "weight": 7},
        {"dataset": lines(tmp_path / "chats.jsonl", [{"messages": c} for c in chats]), "column": "messages"},
        {"dataset": lines(tmp_path / "ids.jsonl", [{"ids": i} for i in ids]), "column": "ids", "weight": 2},
    ]
    changes = {"text.dataset": None, "text.mixture": parts, "text.windows": "one_per_document"}
    changes |= {"generate.held_out_tokens": 300, "generate.chunk_tokens": 800}
    changes |= {"generate.sites": SITES, "model.name": str(model), "text.paragraphs": 2, "generate.tokens": 1600}
    return tiny_config(tmp_path, changes)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_mixture_gives_what_one_process_would_and_is_known_again(cluster, config):
    made = generate(config)
    assert_equals_in_process_harvest(config)
    shown = decoded(config)
    chats, novels = (sum(("<user>" in text) is kind for text in shown) for kind in (True, False))
    assert 0 < chats < novels
    complete = contents(config.source.path)
    assert generate(config)["made"] == 0 < made["made"]
    assert contents(config.source.path) == complete
    first, *others = config.model_dump(mode="json")["text"]["mixture"]
    with pytest.raises(UserError, match=r"was made with text\.mixture = "):
        generate(config.override({"text.mixture": [first | {"weight": 1}, *others]}))
    with pytest.raises(UserError, match=r"text\.windows = 'one_per_document', not 'packed'"):
        generate(config.override({"text.windows": "packed"}))


def decoded(config) -> list[str]:
    """The text of every window of the training share; no padding is a row."""
    tokenizer, opened, found = load_tokenizer(config.model), store.open_store(config.source.path), []
    lengths: set[int] = set()
    for chunk in range(len(opened.chunk_rows)):
        text = opened.windows(chunk)
        assert (text.row_position < text.windows.length[text.row_window]).all()
        lengths |= set(text.windows.length.tolist())
        found += [tokenizer.decode(t[1:n]) for t, n in zip(text.windows.tokens, text.windows.length, strict=True)]
    assert len(lengths) > 2
    return found


def test_local_datasets_of_a_mixture_count_by_name_and_bytes(config, tmp_path):
    def identity(changed):
        return plan.identities(changed, {"mlp_in.0": 64})[False]

    before = identity(config)
    assert [part["dataset"] for part in before["text"]["mixture"]] == ["austen.txt", "chats.jsonl", "ids.jsonl"]
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
    elsewhere = config.override(
        config.text.renamed(lambda name: name.replace(str(tmp_path), f"{tmp_path}-copy"))  # a job's copy
    )
    assert identity(elsewhere) == before
    with open(tmp_path / "ids.jsonl", "a") as file:
        file.write('{"ids": [1]}\n')
    assert identity(config) != before


def test_chats_without_a_template_stop_before_anything_starts(config, asset, monkeypatch):
    monkeypatch.setattr("xlc_ray.cluster.plan.connect", lambda: pytest.fail("a cluster was started"))
    with pytest.raises(UserError, match=r"'messages' of .* has no chat template"):
        generate(config.override({"model.name": asset("tiny-austen-gpt2-d64")}))


def prepare_text(tmp_path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "XLC_ROOT": str(tmp_path)}
    job = [sys.executable, str(ROOT / "jobs/prepare_text.py")]
    return subprocess.run([*job, *words], capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def test_prepare_text_writes_what_text_dataset_reads(tmp_path):
    slip = MEDMCQA | {"question": "Which bone is the longest?", "exp": None}
    places = [
        f"--source=medqa={lines(tmp_path / 'medqa.jsonl', [MEDQA])}",
        f"--source=medmcqa={lines(tmp_path / 'medmcqa.jsonl', [slip, MEDMCQA])}",
    ]
    for strict in ([], ["--strict"]):
        out = "corpus-strict" if strict else "corpus"
        done = prepare_text(tmp_path, "--out", out, "--sources=medqa,medmcqa", *places, *strict)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["medqa", "1", "medmcqa", "2", "3", "documents", "at", str(tmp_path / out)]
        found = load_documents(Text(dataset=str(tmp_path / out)))
        texts = list(found["text"])
        assert [texts[0], texts[2]] == [MEDQA_TEXT, MEDMCQA_TEXT]
        assert ("longest??" in texts[1], "Explanation: None" in texts[1]) == (bool(strict), bool(strict))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: the following arguments are required: --out; see --help"),
        (["--out", "x", "--strikt"], "error: unrecognized arguments: --strikt; see --help"),
        (["--out", "x", "--source", "medqa"], "error: argument --source: 'medqa' should be NAME=VALUE; see --help"),
        (["--out", "x", "--sources=med"], "error: --sources: 'med' is unknown; did you mean medqa? allowed: medmcqa"),
    ],
)
def test_mistakes_of_prepare_text_are_one_line_and_exit_status_2(tmp_path, words, said):
    done = prepare_text(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
