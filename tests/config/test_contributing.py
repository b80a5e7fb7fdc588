"""CONTRIBUTING.md names a test for each defect of earlier systems: those tests exist."""

import re

from tests.config.tree import ROOT


def test_tests_named_for_known_defects_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 20
    assert named - defined == set()
