"""The three jobs in a row, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import RAY, ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def settings(folder):
    """Overrides that make the quickstart small."""
    return [
        "--model.name=configs/assets/tiny-austen-gpt2-d64",
        "--generate.tokens=20_000",
        "--generate.held_out_tokens=2_000",
        "--generate.chunk_tokens=4_000",
        "--dictionary.features=128",
        "--dictionary.gate.k=16",
        "--train.steps=300",
        "--train.checkpoint_every=50",
        "--train.batch_tokens=256",
        f"--out={folder}/run",
        f"--source.path={folder}/store",
    ]


def job(name, *words, **environment):
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", **environment}
    return subprocess.Popen(
        [sys.executable, f"jobs/{name}.py", *words],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def test_text_to_report(folder, settings):
    config = ["--config", "configs/quickstart.yaml", *settings]
    code, out, err = finish(job("generate", *config))
    assert code == 0, err
    assert "20,000 training and 2,000 held-out tokens, 8 sites" in out

    process = job("train", *config)  # interrupted as by Ctrl-C, then run again
    deadline = time.monotonic() + 200
    while not list(Path(folder).glob("run/checkpoints/*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err

    code, out, err = finish(job("train", *config))
    assert code == 0, err
    assert "step 300:" in out

    code, out, err = finish(job("evaluate", "--run", f"{folder}/run", "--evaluate.windows=8", "--evaluate.workers=2",
                                "--evaluate.ablate_features=2"))  # fmt: skip
    assert code == 0, err
    found = json.loads((folder / "run/eval.json").read_text())
    assert len(found["ablated_features"]) == 2
    assert found["explained_variance"] > 0.5
    assert found["ce_recovered"] > 0.5
    assert 5 < found["l0"] < 40
    for key in ("fvu", "dead_features", "kl", "top1_agreement"):
        assert isinstance(found[key], float)
    page = (folder / "run/report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert str(folder / "run/report.html") in out
    assert (folder / "run/features.parquet").exists()
    assert "eval_result_metrics" in json.loads((folder / "run/eval_core.json").read_text())

    code, out, err = finish(job("convert", "--run", f"{folder}/run", "--out", f"{folder}/jump", "--fold"))
    assert code == 0, err
    report = json.loads((folder / "jump/conversion.json").read_text())
    assert report["measured_on"] == "held-out rows"
    assert abs(report["calibrated_l0"] - report["target_l0"]) <= 0.1
    assert abs(report["nmse"]["after"] - report["nmse"]["before"]) < 0.05
    code, out, err = finish(job("evaluate", "--run", f"{folder}/jump", "--evaluate.windows=0"))
    assert code == 0, err
    assert json.loads((folder / "jump/eval.json").read_text())["l0"] == pytest.approx(report["l0"]["after"])
    code, out, err = finish(job("compare", "--run", f"{folder}/run", "--against", f"{folder}/jump"))
    assert code == 0, err
    assert out.splitlines()[-1].split() == ["all", "1.0000", "100.0%", "1.0000", "100.0%"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train", ["--config", "configs/quickstart.yaml", "--train.lrr=1"], "did you mean lr?"),
        ("train", ["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            "train",
            ["--config", "configs/quickstart.yaml", "--source.path=/nowhere", "--source.make_if_missing=false"],
            "no complete store",
        ),
        ("generate", ["--config", "configs/quickstart.yaml", "--model.name=./no-model"], "no-model"),
        ("generate", ["--config", "configs/quickstart.yaml", "--text.column=body"], "body"),
        ("generate", ["--config", "configs/quickstart.yaml", "--generate.tokens=0"], "greater than or equal to 1"),
        ("generate", ["--config", "configs/quickstart.yaml", "--source.path=/proc/store"], "/proc/store"),
        ("evaluate", ["--run", "runs/nothing-here"], "no complete checkpoint"),
        ("evaluate", [], "--run: missing"),
        ("convert", ["--run", "runs/nothing-here"], "--out: missing"),
        ("compare", ["--run", "runs/nothing-here"], "--against: missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(name, words, message, tmp_path):
    code, _, err = finish(job(name, *words, XLC_ROOT=str(tmp_path)))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


def test_ray_job_submit_runs_the_quickstart_from_a_copy(head, settings):
    """`ray job submit --working-dir .`: relative paths would vanish with the copy, so they go below $XLC_ROOT."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    small = [w for w in settings if not w.startswith(("--out", "--source"))]

    def submit(*words):
        job = [sys.executable, "jobs/train.py", "--config", "configs/quickstart.yaml", *small, *words]
        command = [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *job]
        return subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200
        )

    done = submit("--train.lr=3e-4")
    assert done.returncode == 0, done.stdout
    assert (head.root / "runs/quickstart/checkpoints/step_300/complete.json").exists()
    assert "lr: 0.0003" in (head.root / "runs/quickstart/config.yaml").read_text()
    bad = submit("--train.steps=x")
    assert bad.returncode != 0
    assert "train.steps: 'x'" in bad.stdout
