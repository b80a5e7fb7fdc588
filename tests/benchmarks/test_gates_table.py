"""The table of gates: a search meets its target, runs are kept, what is refused is said. No figure is judged."""

import json
import math

import pytest

from tests.benchmarks import gates
from xlc_ray.config import UserError

TINY = ["--wirings", "sae", "--features", "64", "--l0", "4", "--steps", "4", "--batch", "64", "--tokens", "600"]
TINY += ["--held-out", "200", "--threads", "1", "--tries", "1"]


def test_cells_hold_what_the_table_prints_and_are_kept(tmp_path, monkeypatch, capsys):
    words = ["--gates", "batchtopk,relu l1", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json"), *TINY]
    monkeypatch.setattr("sys.argv", ["gates.py", *words])
    gates.main()
    cells = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert list(cells) == ["batchtopk", "relu l1"]
    for found in (cells["batchtopk"]["sae"], cells["relu l1"]["sae"]):
        assert set(found) >= set(gates.COLUMNS)
        assert found["explained_variance"] == pytest.approx(1 - found["fvu"])
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.startswith(f"| batchtopk | {cells['batchtopk']['sae']['explained_variance']:.3f} · ")
    monkeypatch.delattr(gates, "train_alone")
    again = gates.run(gates.arguments(words))["cells"]
    for gate in cells:  # the speed is measured each time
        assert again[gate]["sae"] | {"tokens_per_s": 0} == cells[gate]["sae"] | {"tokens_per_s": 0}


def test_what_the_settings_refuse_is_said_in_the_cell(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("dictionary.gate: not here")

    monkeypatch.setattr(gates, "settings", refuse)
    found = gates.cell(gates.arguments(TINY), "sae", gates.GATES["topk"])
    assert found == {"refused": "dictionary.gate: not here"}
    assert gates.text(found) == "dictionary.gate: not here"


@pytest.mark.parametrize("start", [0.01, 0.3, 20.0])
def test_a_search_finds_the_coefficient_of_an_l0(start):
    def l0_of(coefficient):
        return 40 * coefficient**-0.7 * math.exp(-0.1 * coefficient)

    tried = [(start, {"l0": l0_of(start)})]
    for _ in range(8):
        coefficient = gates.further(tried, 32)
        tried.append((coefficient, {"l0": l0_of(coefficient)}))
    assert tried[-1][1]["l0"] == pytest.approx(32, rel=gates.NEAR)


@pytest.mark.parametrize("words", [["--gates", "step"], ["--wirings", "ring"], ["--l0", "0"]])
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        gates.arguments(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err
