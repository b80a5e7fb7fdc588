"""The benchmarks run, compare equals, and write what they promise. No figure is judged: that is RESULTS.md's matter."""

import json
import math

import pytest
import torch

from tests.benchmarks import data, scaling, step, sweeps
from tests.training import texts

TINY = ["--layers", "2", "--width", "8", "--features", "64", "--batch", "32", "--k", "4"]
TINY += ["--repeats", "2", "--threads", "1", "--device", "cpu"]
KEYS = {
    "speedup_over_naive",
    "speedup_over_dense",
    "tokens_per_s",
    "peak_bytes",
    "phases",
    "roofline_share",
    "predicted_seconds",
    "seconds",
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("gate", ["batchtopk", "topk", "relu", "jumprelu"])
@pytest.mark.parametrize("wiring", ["clt", "sae"])
def test_all_variants_start_from_the_same_loss(gate, wiring):
    found = step.run(step.arguments([*TINY, "--gate", gate, "--wiring", wiring, "--dtype", "float32", "--no-memory"]))
    losses = found["first_loss"]
    assert losses["naive"] == pytest.approx(losses["engine"], rel=1e-5)
    assert losses["dense"] == pytest.approx(losses["engine"], rel=1e-5)


def test_the_results_hold_what_they_promise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step.py", *TINY, "--json", str(tmp_path / "found.json")])
    step.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) >= KEYS
    assert found["interleaved"]
    assert set(found["phases"]) == {"encode_and_select", "decode", "backward", "gradient_norm", "optimizer", "other"}
    assert 10**8 < found["peak_bytes"] < 10**10
    assert len(found["seconds"]["engine"]) == 2
    printed = capsys.readouterr().out
    assert "engine is faster by" in printed
    assert "roofline" in printed


@pytest.mark.slow
def test_a_split_engine_is_measured_alike():
    found = step.run(step.arguments([*TINY, "--tp", "2", "--dtype", "float32", "--no-memory"]))
    assert found["first_loss"]["engine"] == pytest.approx(found["first_loss"]["naive"], rel=1e-5)


@pytest.mark.parametrize("words", [["--variants", "fast"], ["--batch", "0"], ["--gate", "step"]])
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        step.arguments(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_scaling_walks_the_axes_asked_for(capsys):
    words = ["--axes", "features,k", "--features-points", "32", "64", "--k-points", "2", "4", "--no-memory", *TINY]
    found = scaling.run(scaling.arguments(words))
    rows = found["axes"]["features"]
    assert [row["point"] for row in rows] == [32, 64]
    assert rows[1]["work"] == 2 * rows[0]["work"]
    assert rows[0]["growth"] == 1
    assert rows[1]["growth"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"] / 2)
    assert [row["work"] for row in found["axes"]["k"]] == [rows[1]["work"]] * 2
    assert "per unit of encoder work" in scaling.table(found)


def test_one_stream_reads_once_and_changes_no_bit(tmp_path, capsys, monkeypatch):
    config = texts.settings(tmp_path, {"train.end_to_end": None, "train.loss": {}})
    texts.harvest(config, [f"resid_post.{layer}" for layer in range(4)])
    (tmp_path / "run.yaml").write_text(config.yaml())
    words = ["--config", str(tmp_path / "run.yaml"), "--wiring", "sae", "--steps", "3", "--batch", "60"]
    words = ["shared", *words, "--features", "48", "--trials", "3", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["sweeps.py", *words, "--json", str(tmp_path / "found.json")])
    sweeps.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["store"]["shared"]["rows"], found["store"]["alone"]["rows"]) == (180, 3 * 180)
    assert found["store"]["alone"]["bytes"] == 3 * found["store"]["shared"]["bytes"] > 0
    assert found["model"]["alone"]["model_tokens"] == 3 * found["model"]["shared"]["model_tokens"] > 0
    assert found["model"]["shared"]["rows"] == 0
    assert found["store"]["equal_bits"]
    assert found["model"]["equal_bits"]
    assert "3 trials on one stream" in capsys.readouterr().out


def test_a_frontier_is_compared_at_the_points_of_the_other():
    full = [(8.0, 0.4), (32.0, 0.2), (128.0, 0.1)]
    assert sweeps.worst_excess(full, full) == pytest.approx(0)
    assert sweeps.worst_excess(full, [full[0], full[2]]) == pytest.approx(0), "on the line between"
    assert sweeps.worst_excess(full, [full[0], (32.0, 0.21), full[2]]) == pytest.approx(0.05)
    assert sweeps.worst_excess(full, full[:2]) == pytest.approx(1)
    assert sweeps.worst_excess(full, full[1:]) == math.inf


@pytest.mark.slow
def test_every_source_feeds_a_rank_and_is_compared_with_a_raw_read(tmp_path):
    words = ["--layers", "1", "--many-layers", "2", "--width", "16", "--bytes", "1e5", "--batch", "64"]
    words += ["--repeats", "1", "--no-cold"]
    found = data.run(data.arguments(words), str(tmp_path))
    assert set(found) >= {"store_share_of_raw", "tp2_cost_over_tp1", "layers_share"}
    assert set(found["seconds"]) == {
        "raw",
        "raw_buffer",
        "local",
        "straddling",
        "many_layers",
        "zstd",
        "int8",
        "http",
        "tp2",
    }
    assert found["store_share_of_raw"] == pytest.approx(found["seconds"]["raw"][0] / found["seconds"]["local"][0])
    assert "tp2_cost_over_tp1" in data.table(found)
