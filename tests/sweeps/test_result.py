"""What a sweep answers from its directory: the frame, the frontier, the best at a sparsity, the picture, the table."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

import xlc_ray as xlc
from xlc_ray import files
from xlc_ray.config import UserError
from xlc_ray.sweeps.board import Row
from xlc_ray.sweeps.table import Table

POINTS = {"a": (16, 0.4), "b": (64, 0.2), "c": (30, 0.5), "d": (256, 0.1)}


def row(name, l0=None, fvu=None, **more):
    metrics = {} if l0 is None else {"l0": l0, "fvu": fvu, "explained_variance": 1 - fvu}
    settings = {"dictionary.gate.kind": "topk", "train.lr": 0.1}
    return Row(**{"trial": name, "state": "finished", "step": 9, "steps": 9, "settings": settings, "metrics": metrics,
                  "out": f"trials/{name}"} | more)  # fmt: skip


@pytest.fixture
def found(tmp_path):
    rows = [row(name, *point) for name, point in POINTS.items()]
    rows.append(row("e", settings={"seed": 3}, state="failed", error="no <memory>"))
    counts = {"trials": 5, "finished": 4, "stopped": 0, "failed": 1, "share_of_full_steps": 0.9}
    files.write_json(f"{tmp_path}/sweep.json", counts | {"rows": [asdict(r) for r in rows]})
    return xlc.Sweep(str(tmp_path))


def test_a_frame_has_a_row_a_trial_and_a_column_a_setting(found):
    frame = found.frame().set_index("trial")
    assert list(frame.index) == ["a", "b", "c", "d", "e"]
    assert frame.loc["a", "train.lr"] == 0.1
    assert math.isnan(frame.loc["e", "train.lr"])
    assert (frame.loc["e", "seed"], frame.loc["e", "error"]) == (3, "no <memory>")
    assert frame.loc["b", "out"].endswith("/trials/b")


def test_the_frontier_of_l0_and_fvu(found):
    assert list(found.pareto()["trial"]) == ["a", "b", "d"]
    files.write_json(f"{found.out}/sweep.json", {"rows": [asdict(row("f", 0.0, 1.0)), asdict(row("a", 16, 0.4))]})
    assert list(found.pareto()["trial"]) == ["a"], "f explains nothing"
    files.write_json(f"{found.out}/sweep.json", {"rows": [asdict(row("f", 0.0, 1.0))]})
    with pytest.raises(UserError, match="no trial lies on the frontier of l0 and fvu"):
        found.best("fvu", at={"l0": 8})


def test_the_frontier_of_other_metrics(found):
    assert list(found.pareto("l0", "explained_variance")["trial"]) == ["a", "b", "d"]
    with pytest.raises(UserError, match="'loss' is not measured by sweeps; allowed: fvu"):
        found.pareto("l0", "loss")


def test_the_picture_is_the_frontier_in_a_file_of_its_own(found, tmp_path):
    root = ElementTree.parse(found.plot(str(tmp_path / "frontier.svg"))).getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{name}svg"
    dots = {
        dot.find(f"{name}title").text.split()[0].rstrip(":"): dot.get("class") for dot in root.iter(f"{name}circle")
    }
    assert {trial for trial, kind in dots.items() if "best" in kind} == {"a", "b", "d"}
    assert len(dots) == 4
    assert "--accent:" in root.find(f"{name}style").text, "colours come along"


def test_the_best_says_how_it_was_found(found):
    assert (found.best("fvu").trial, found.best("fvu").how) == ("d", "measured")
    between = found.best("fvu", at={"l0": 32})
    assert (between.trial, between.how) == ("b", "interpolated")
    assert between.value == pytest.approx(0.4 / math.sqrt(2))
    assert between.metrics["fvu"] == 0.2
    assert found.best("fvu", at={"l0": 64}).how == "measured"
    beyond = found.best("fvu", at={"l0": 1000})
    assert (beyond.trial, beyond.how, beyond.at, beyond.value) == ("d", "nearest", {"l0": 256}, 0.1)
    assert found.best("explained_variance", at={"l0": 16}).value == 0.6
    with pytest.raises(UserError, match="give one metric"):
        found.best("fvu", at={"l0": 1, "fvu": 2})


@pytest.mark.parametrize(
    ("metric", "ends", "value"),
    [
        ("kl", (0.4, 0.1), 0.2),  # an error: half way in logarithms
        ("kl", (0.4, 0.0), 0.2),  # which 0 has not
        ("explained_variance", (0.4, 0.9), 0.65),
        ("explained_variance", (-0.5, 0.9), 0.2),
        ("l2_ratio", (0.5, 0.9), 0.7),
    ],
)
def test_between_two_trials_errors_are_read_off_in_logarithms_and_all_else_as_it_is(found, metric, ends, value):
    rows = [asdict(row(n, metrics={"l0": l0, metric: y})) for n, l0, y in zip("ab", (16, 64), ends, strict=True)]
    files.write_json(f"{found.out}/sweep.json", {"rows": rows})
    best = found.best(metric, at={"l0": 32})
    assert (best.how, best.value) == ("interpolated", pytest.approx(value))


def test_a_place_of_which_there_is_no_logarithm_is_a_place(found):
    rows = [asdict(row(n, metrics={"dead_features": x, "fvu": y})) for n, x, y in (("a", 0, 0.4), ("b", 0.5, 0.1))]
    files.write_json(f"{found.out}/sweep.json", {"rows": rows})
    assert found.best("fvu", at={"dead_features": 0}).how == "measured"
    between = found.best("fvu", at={"dead_features": 0.25})
    assert (between.how, between.value) == ("interpolated", pytest.approx(0.2))
    assert found.best("fvu", at={"dead_features": -1}).at == {"dead_features": 0}


def test_a_trial_that_failed_is_no_answer(found):
    failed = row("broken", 8, 0.01, state="failed", error="its workers died")
    files.write_json(f"{found.out}/sweep.json", {"rows": [asdict(failed), asdict(row("a", 16, 0.4))]})
    assert list(found.pareto()["trial"]) == ["a"]
    assert found.best("fvu").trial == found.best("fvu", at={"l0": 8}).trial == "a"
    files.write_json(f"{found.out}/sweep.json", {"rows": [asdict(failed)]})
    with pytest.raises(UserError, match="no trial has measured fvu yet"):
        found.best("fvu")


def test_a_picture_of_nothing_is_refused_and_a_page_says_so(found, tmp_path):
    counts = {"trials": 1, "finished": 0, "stopped": 0, "failed": 0, "share_of_full_steps": 0.0}
    files.write_json(f"{found.out}/sweep.json", counts | {"rows": [asdict(row("a", state="waiting"))]})
    with pytest.raises(UserError, match="no trial has measured l0 and fvu yet"):
        found.plot(str(tmp_path / "frontier.svg"))
    assert "Nothing was measured yet." in Path(found.plot(str(tmp_path / "report.html"))).read_text()


def test_an_axis_with_values_of_no_logarithm_is_linear(found, tmp_path):
    values = (-0.5, 0.25, 1.0)
    rows = [asdict(row(n, metrics={"l0": 16, "explained_variance": y})) for n, y in zip("abc", values, strict=True)]
    files.write_json(f"{found.out}/sweep.json", {"rows": rows})
    root = ElementTree.parse(found.plot(str(tmp_path / "ev.svg"), "l0", "explained_variance")).getroot()
    low, middle, high = (float(dot.get("cy")) for dot in root.iter("{http://www.w3.org/2000/svg}circle"))
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    ticks = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("text-anchor") == "end"]
    assert ticks == ["-0.5", "0", "0.5", "1"]


def test_a_frame_goes_to_parquet_whatever_the_settings_are(found, tmp_path):
    settings = [{"train.loss": {}, "dictionary.gate.k": 8}, {"train.loss": {}, "dictionary.gate.k": 8}, {"seed": 2}]
    rows = [asdict(row(name, settings=s, out="")) for name, s in zip("abc", settings, strict=True)]
    files.write_json(f"{found.out}/sweep.json", {"rows": rows})
    frame = found.frame()
    assert str(frame["dictionary.gate.k"].dtype) == str(frame["seed"].dtype) == "Int64"
    assert frame["dictionary.gate.k"][0] == 8
    assert len(frame.drop(columns="trial").drop_duplicates()) == 2
    frame.to_parquet(tmp_path / "frame.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "frame.parquet"), frame, check_dtype=False)


def page_of(found, tmp_path):
    return ElementTree.fromstring(
        Path(found.plot(str(tmp_path / "report.html"))).read_text().partition("<main>")[2].partition("<script>")[0]
        .join(("<main>", "</main>"))
    )  # fmt: skip


def test_the_page_shows_every_measured_trial_and_asks_nobody(found, tmp_path):
    page = page_of(found, tmp_path)
    (frontier, _) = page.iter("svg")
    assert [dot.get("class") for dot in frontier.iter("circle")] == [
        "dot best", "dot best", "dot finished", "dot best",
    ]  # fmt: skip
    assert "train.lr = 0.1" in next(frontier.iter("title")).text
    table = [[cell.text for cell in row] for row in page.iter("tr")]
    assert [row[0] for row in table] == ["trial", "a", "b", "c", "d", "e"]
    assert table[-1][-1] == "no <memory>"
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href|url\(|@import|http)", text)


def test_the_page_draws_settings_that_differ_and_where_trials_were_cut(tmp_path):
    settings = [{"train.lr": lr, "seed": 1} | ({"dictionary.gate.k": k} if k else {}) for lr, k in
                ((0.1, 8), (0.001, 16), (0.1, None))]  # fmt: skip
    rows = [row(name, *POINTS[name], settings=s) for name, s in zip("abc", settings, strict=True)]
    rows[1] = dataclasses.replace(rows[1], state="stopped", step=4)
    counts = {"trials": 3, "finished": 2, "stopped": 1, "failed": 0, "share_of_full_steps": 0.8, "rungs": [4]}
    files.write_json(f"{tmp_path}/sweep.json", counts | {"rows": [asdict(r) for r in rows]})
    for r in rows:
        lines = [{"step": step, "explained_variance": 1 - 1 / step} for step in range(2, r.step + 1)]
        files.write_bytes(
            f"{tmp_path}/trials/{r.trial}/metrics.jsonl", "".join(map(json.dumps, lines)).replace("}{", "}\n{").encode()
        )
    _, parallel, curves = page_of(xlc.Sweep(str(tmp_path)), tmp_path).iter("svg")
    names = [text.find("title").text for text in parallel.iter("text") if text.find("title") is not None]
    assert names == ["train.lr", "dictionary.gate.k", "l0", "fvu"], "the seed is that of all"
    heights = {
        line.get("data-t"): [p.split(",")[1] for p in line.get("points").split()] for line in parallel.iter("polyline")
    }
    assert heights["0"][0] == heights["2"][0] != heights["1"][0]
    assert heights["2"][1] == "330.0", "without a k"
    (rung,) = [line for line in curves.iter("line") if line.get("class") == "rung"]
    (cut,) = [dot for dot in curves.iter("circle") if "cut" in dot.get("class")]
    assert (cut.get("data-t"), cut.get("cx")) == ("1", rung.get("x1"))
    ends = {line.get("data-t"): line.get("points").split()[-1] for line in curves.iter("polyline")}
    assert ends["1"] == f"{cut.get('cx')},{cut.get('cy')}"
    assert ends["0"] == ends["2"]


def test_a_directory_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected the directory of a sweep"):
        xlc.Sweep(str(tmp_path))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_redraws_what_runs_on_a_terminal_and_adds_lines_elsewhere():
    done, one, two = row("a", 16, 0.4), row("longer", state="running", step=0), row("b", 8, 0.6, state="running")
    screen, log = Terminal(), io.StringIO()
    for stream in (screen, log):
        table = Table(stream)
        for changed in (one, two, done):
            table(changed, [done, one, two] if changed is done else [one, two])
    lines = screen.getvalue().splitlines()
    assert [line.count("\x1b[2A\x1b[J") for line in lines] == [0, 0, 1, 0, 1, 0, 0]
    assert "a             9/9   fvu 0.4000   l0   16.0   finished" in lines[4]
    assert [line.split()[0] for line in lines[5:]] == ["longer", "b"]
    assert log.getvalue().splitlines() == [table.line(two), table.line(done)]


def test_on_a_terminal_what_is_drawn_over_is_no_wider_than_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    running, screen = row("a_name_of_some_length", 16, 0.4, state="running"), Terminal()
    table = Table(screen)
    for _ in range(2):
        table(running, [running])
    failed = dataclasses.replace(running, state="failed", error="its workers died")
    table(failed, [failed])
    back, short = "\x1b[1A\x1b[J", table.line(running)[:30]
    assert screen.getvalue().splitlines() == [short, back + short, back + table.line(failed)]
