"""The command line: overrides, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from xlc_ray.cluster import cli
from xlc_ray.cluster.compare import compare
from xlc_ray.cluster.convert import convert
from xlc_ray.cluster.evaluate import evaluate
from xlc_ray.config import Config, UserError
from xlc_ray.config.sweep import SweepConfig
from xlc_ray.training import Diverged

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def test_overrides_replace_what_stands_at_their_path():
    config = cli.parse(
        ["--config", QUICKSTART, "--train.lr=3e-4", "--dictionary.gate={kind: jumprelu, bandwidth: 1e-1}", "--seed=7"]
    )
    assert config.train.lr == 3e-4
    assert (config.dictionary.gate.kind, config.dictionary.gate.bandwidth) == ("jumprelu", 0.1)
    assert config.seed == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-.5e3", -500.0),
        ("400_000", 400000),
        ("[1e-3, 2]", [1e-3, 2]),
        ("null", None),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
    ],
)
def test_values_are_yaml_with_numbers_that_look_like_numbers(text, value):
    _, changes = cli.words_of(["--config", "FILE", f"--x={text}"], "--config")
    found = changes["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config: missing"),
        (["--config"], "--config: missing"),
        (["train.lr=1", "--config", QUICKSTART], "train.lr=1: expected"),
        (["--config", QUICKSTART, "--train.lr", "1"], "--train.lr: needs a value"),
        (["--config", QUICKSTART, "--train.lrr=1"], "did you mean lr?"),
        (["--config", QUICKSTART, "--train.lr=[1"], "--train.lr: not YAML: line 1"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_line_that_names_them(argv, message):
    with pytest.raises(UserError) as error:
        cli.parse(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def run_job(body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    script = (
        f"from xlc_ray.cluster import cli\nfrom xlc_ray.config import UserError\n{body}\ncli.run(main, 'About it.')"
    )
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, cwd=ROOT, check=False)


def test_exit_status_tells_success_mistake_interruption_and_defect_apart():
    body = """
def main(config):
    match config.seed:
        case 1: raise UserError("text.column: wrong")
        case 2: raise KeyboardInterrupt
        case 3: raise ZeroDivisionError("ours")
    print("seed", config.seed)
"""
    done = [run_job(body, "--config", QUICKSTART, f"--seed={seed}") for seed in range(4)]
    assert [d.returncode for d in done] == [0, 2, 130, 1]
    assert done[0].stdout == "seed 0\n"
    assert done[1].stderr == "error: text.column: wrong\n"
    assert "kept" in done[2].stderr
    assert "ZeroDivisionError: ours" in done[3].stderr
    assert "output of the workers" not in done[3].stderr  # no cluster was joined


@pytest.mark.cluster
@pytest.mark.slow
def test_a_failed_job_says_where_ray_keeps_its_logs():
    body = """
import os
from xlc_ray.cluster.session import connect
os.environ["RAY_AUTH_MODE"] = "disabled"
def main(config):
    connect()
    raise ZeroDivisionError("ours")
"""
    done = run_job(body, "--config", QUICKSTART)
    assert done.returncode == 1
    assert "ZeroDivisionError: ours" in done.stderr
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("failed; ")]
    assert Path(last.split(": ")[1].split("/worker-*")[0]).is_dir()


def test_a_job_has_options_beside_settings():
    """They stand in --help, go to the job by name, and a mistake in one is a line like any other."""
    body = """
own = cli.Options()
own.add_argument("--nodes", type=int, default=1, help="machines")
def main(config, nodes):
    print("seed", config.seed, "nodes", nodes)
cli.run(main, "About it.", own)
"""
    done = [run_job(body, *words) for words in (["--help"], ["--config", QUICKSTART, "--nodes=x"])]
    assert "--nodes" in done[0].stdout
    assert "machines" in done[0].stdout
    assert (done[1].returncode, done[1].stderr.count("\n")) == (2, 1)
    assert done[1].stderr.startswith("error: argument --nodes: invalid int value: 'x'")
    given = run_job(body, "--config", QUICKSTART, "--nodes", "3", "--seed=2")
    assert given.stdout == "seed 2 nodes 3\n"


def test_help_explains_itself_without_a_config():
    done = run_job("main = print", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("About it.", "usage:", "--config", "dictionary", "cluster"))
    section = cli.help_text(["--help", "train"], "About it.", "--config", cli.Options())
    assert "--train.lr (required): Peak learning rate." in section
    assert "--train.loss.sparsity.coefficient" in section


@pytest.mark.parametrize("model", [Config, SweepConfig])
def test_help_sets_sections_apart_and_folds_them_to_the_terminal(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli.help_text(["--help"], "About it.", "--config", cli.Options(), model)
    listed = shown.split("SECTION):\n")[1].split("\n\n")[0].splitlines()
    names = [words[0] for line in listed if line[2] != " " and (words := line.split("  ")[1:])]
    assert names == [*model.model_fields, *(["preset"] if model is Config else [])]
    assert max(map(len, listed)) <= 80
    (column,) = {len(line) - len(line.lstrip()) for line in listed if line[2] == " "}
    assert all(line[column - 1] == " " != line[column] for line in listed)


def test_evaluation_takes_no_settings_of_training(tmp_path):
    for name in ("dictionary.gate.k", "train.lr", "dictionary.features"):
        said = rf"{name}: is taken from the run; allowed: evaluate, clus"
        with pytest.raises(UserError, match=said):
            evaluate(str(tmp_path), {"evaluate.windows": 0, name: 1})
        with pytest.raises(UserError, match=said):
            convert(str(tmp_path), str(tmp_path / "new"), {"train.calibration_tokens": 99, name: 1})
        with pytest.raises(UserError, match=said):
            compare(str(tmp_path), str(tmp_path), {name: 1})


def diverge():
    raise Diverged("step 3: the gradient norm is nan; lower train.lr or check the activations")


def test_a_diverged_run_is_a_mistake_that_the_user_can_mend():
    """As itself, as the cause of another error, and as the text that Ray makes of it."""
    with pytest.raises(Diverged) as error:
        diverge()
    around = RuntimeError("a worker failed")
    around.__cause__ = error.value
    text = RuntimeError("".join(traceback.format_exception(error.value)))
    for found in map(cli.find_user_error, (error.value, around, text)):
        assert str(found) == str(error.value)
    body = (
        "from xlc_ray.training import Diverged\ndef main(config):\n    raise Diverged('step 3: nan')\ncli.run(main, '')"
    )
    done = run_job(body, "--config", QUICKSTART)
    assert (done.returncode, done.stderr) == (2, "error: step 3: nan\n")
