"""The benchmarks run, compare equals, and write what they promise. No figure is judged: that is RESULTS.md's matter."""

import json

import pytest
import torch

from tests.benchmarks import data, scaling, step

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


@pytest.mark.slow
def test_every_source_feeds_a_rank_and_is_compared_with_a_raw_read(tmp_path):
    words = ["--layers", "1", "--many-layers", "2", "--width", "16", "--bytes", "1e5", "--batch", "64"]
    words += ["--repeats", "1", "--no-cold"]
    found = data.run(data.arguments(words), str(tmp_path))
    assert set(found) >= {"store_share_of_raw", "tp2_cost_over_tp1", "layers_share"}
    assert set(found["seconds"]) == {"raw", "raw_buffer", "local", "many_layers", "int8", "http", "tp2"}
    assert found["store_share_of_raw"] == pytest.approx(found["seconds"]["raw"][0] / found["seconds"]["local"][0])
    assert "tp2_cost_over_tp1" in data.table(found)
