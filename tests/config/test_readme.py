"""What the README says exists: commands, overrides, configuration files, code, links."""

from __future__ import annotations

import ast
import re
import shlex

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
