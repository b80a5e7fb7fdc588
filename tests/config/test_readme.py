"""What the README says exists: commands, overrides, configuration files, code, links."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest

import xlc_ray
from tests.config.tree import FILES, ROOT
from xlc_ray.config import load_config
from xlc_ray.config.sweep import load_sweep

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    line.split(" # ")[0] for kind, body in BLOCKS if not kind for line in body.splitlines() if "python jobs/" in line
]

JOBS = sorted((ROOT / "jobs").glob("*.py"))


@functools.cache
def help_of(job: str, *section: str) -> str:
    """What a job, run in this process, says to --help."""
    path, known, said = str(ROOT / "jobs" / job), set(sys.modules), io.StringIO()
    with (
        mock.patch.multiple(sys, argv=[path, "--help", *section], path=[str(ROOT / "jobs"), *sys.path]),
        mock.patch.object(sys, "excepthook"),
        contextlib.redirect_stdout(said),
        pytest.raises(SystemExit) as left,
    ):
        runpy.run_path(path, run_name="__main__")
    for name in {file.stem for file in JOBS} - known:  # jobs import each other by such names
        sys.modules.pop(name, None)
    assert left.value.code == 0
    return said.getvalue()


@pytest.mark.parametrize("job", JOBS, ids=lambda file: file.name)
def test_help_of_every_job_says_what_it_does(job):
    """Pitfall 22: in argparse one % in the text of an option is enough for a crash."""
    about = ast.get_docstring(ast.parse(job.read_text())).splitlines()[0]
    assert about in " ".join(help_of(job.name).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_in_the_help_of_its_job_or_a_setting(command):
    words = shlex.split(command)
    job = next(word for word in words if word.startswith("jobs/"))
    for word in words[words.index(job) + 1 :]:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not flag.endswith("…"):  # what a table cuts
            section = flag.removeprefix("--").partition(".")[0]
            helps = help_of(job.removeprefix("jobs/")) + help_of(job.removeprefix("jobs/"), section)
            assert re.search(rf"(?<!\S)\[?{re.escape(flag)}(?![\w.-])", helps), f"{job} takes no {flag}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_jobs_files_and_settings_that_exist(command):
    words = shlex.split(command)
    job = words.index("python") + 1
    assert (ROOT / words[job]).is_file()
    options = dict(zip(words[job + 1 :], [*words[job + 2 :], ""], strict=True))
    if "sweep" in words[job]:
        if "--base" not in command:
            load_sweep(ROOT / options["--config"])
    elif "--config" in options:
        load_config(ROOT / options["--config"], dict(w.removeprefix("--").split("=", 1) for w in options if "=" in w))


def test_every_job_has_a_command():
    assert {re.search(r"jobs/(\w+)", command).group(1) for command in COMMANDS} == {
        file.stem for file in (ROOT / "jobs").glob("*.py")
    }


def test_python_uses_names_that_exist():
    code = "".join(body for kind, body in BLOCKS if kind == "python")
    used = {n.attr for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "xlc"}
    assert used == {"load_config", "generate", "train", "evaluate", "load", "sweep"}
    assert used <= set(xlc_ray.__all__)


def test_every_configuration_is_listed_and_there():
    assert set(re.findall(r"^\| `(\w+)\.yaml` \|", README, re.M)) == {file.stem for file in FILES}


def test_links_and_code_in_the_tree_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = {"#" + title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)}
    assert [link for link in links if link not in headings and not (ROOT / link).exists()] == []
    (tree,) = [body for kind, body in BLOCKS if body.startswith("xlc_ray/\n")]
    here = {file.name for file in (ROOT / "xlc_ray").rglob("*.py")}
    assert [name for name in re.findall(r"\b\w+\.py\b", tree) if name not in here] == []


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake (\w[\w-]*)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test", "check"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.M)] == []


def test_ci_makes_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text()
    ran = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci/run").read_text(), re.M)
    assert {"check", "test", "test-slow"} <= set(ran)
    assert [name for name in ran if not re.search(rf"^{name}:", makefile, re.M)] == []
