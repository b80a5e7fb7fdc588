"""The whole training job of one process: from a store to checkpoints, interrupted and resumed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import h5py
import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tests.runs import Interrupted, final_state, interrupt_at
from xlc_ray import files
from xlc_ray.activations import source
from xlc_ray.config import UserError
from xlc_ray.dictionary import checkpoint
from xlc_ray.training import Diverged, logs, train_alone


@pytest.mark.parametrize(
    "gate",
    [
        {"dictionary.gate": {"kind": "batchtopk", "k": 3, "threshold_start": 3}},
        {
            "dictionary.gate": {"kind": "jumprelu"},
            "train.loss": {"sparsity": {"kind": "tanh", "coefficient": 0.1}, "preactivation": 1e-3},
        },
        {
            "dictionary.gate": {"kind": "hard_concrete", "final_beta": 0.2},
            "train.loss": {"sparsity": {"kind": "l0", "coefficient": 0.1}},
        },
        {"dictionary.gate": {"kind": "batchtopk", "k": 3, "rank_by": "zscore", "threshold_start": 3}},
        {"dictionary.features": 1024, "train.optimizer": {"states": "int8"}, "train.clip_norm": 0.1},
    ],
    ids=["batchtopk", "jumprelu", "hard_concrete", "zscore", "8-bit moments"],
)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(small_run, tmp_path, gate):
    whole = small_run({**gate, "out": str(tmp_path / "whole")})
    train_alone(whole)
    broken = small_run({**gate, "out": str(tmp_path / "broken")})
    for stop in (6, 11):  # after the checkpoints of steps 4 and 8; the steps since are lost and done again
        with pytest.raises(Interrupted):
            train_alone(broken.override({"train.log_every": 1}), interrupt_at(stop))
    train_alone(broken)
    want, got = final_state(whole), final_state(broken)
    assert want.keys() == got.keys()
    assert any(k.startswith("optimizer.") for k in want)
    assert any(k.startswith("silent_tokens.") for k in want)
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


def test_metrics_of_repeated_steps_count_once(small_run):
    config = small_run({"train.log_every": 1})
    with pytest.raises(Interrupted):
        train_alone(config, interrupt_at(7))
    train_alone(config)
    assert [line["step"] for line in logs.read(config.out)] == list(range(1, 13))
    written = Path(config.out, "metrics.jsonl").read_text().splitlines()
    assert len(written) > 12


def test_metrics_are_appended_and_never_rewritten(small_run, monkeypatch):
    """Pitfall 27, also by a run that goes on."""
    write, paths = files.write_bytes, []

    def noted(path, data):
        assert not path.endswith(logs.FILE)
        paths.append(path)
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", noted)
    config = small_run({"train.log_every": 1})
    with pytest.raises(Interrupted):
        train_alone(config, interrupt_at(7))
    path, before = Path(config.out, logs.FILE), Path(config.out, logs.FILE).read_bytes()
    inode = path.stat().st_ino
    train_alone(config)
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(before)
    assert paths


@pytest.mark.parametrize("where", ["{tmp}/cut", "memory://cut"])
def test_a_line_of_metrics_that_was_cut_costs_no_other(small_run, tmp_path, where):
    """As a disk leaves it that is full in the middle of an append."""
    config = small_run({"train.log_every": 1, "out": where.format(tmp=tmp_path)})
    with pytest.raises(Interrupted):
        train_alone(config, interrupt_at(7))
    path = files.join(config.out, "metrics.jsonl")
    files.write_bytes(path, files.read_bytes(path)[:-40])
    assert [line["step"] for line in logs.read(config.out)] == list(range(1, 7))
    assert logs.last(config.out)["step"] == 6
    train_alone(config)
    assert [line["step"] for line in logs.read(config.out)] == list(range(1, 13))
    assert logs.last(config.out)["step"] == 12
    steps = [line["step"] for line in map(json.loads, files.read_bytes(path).splitlines()[7:])]
    assert steps == list(range(5, 13)), "from the checkpoint of step 4 on, each in a line of its own"
    files.append(path, "\0\n")
    assert logs.last(config.out)["step"] == 12


def test_more_than_one_epoch_and_tokens_counted(small_run):
    """12 batches of 40 rows from a store of 203: training is not capped at an epoch (pitfall 11)."""
    last = train_alone(small_run())
    assert last["step"] == 12
    assert last["tokens"] == 480


def test_checkpoints_are_pruned_and_a_finished_run_is_left_alone(small_run):
    config = small_run({"train.keep": 2})
    train_alone(config)
    assert checkpoint.steps(config.out) == [8, 12]
    metrics = Path(config.out, "metrics.jsonl")
    content = metrics.read_bytes()
    assert train_alone(config)["step"] == 12
    assert metrics.read_bytes() == content


def test_half_written_checkpoint_is_passed_over(small_run, tmp_path):
    config = small_run()
    train_alone(config)
    (tmp_path / "run/checkpoints/step_12/complete.json").unlink()
    assert checkpoint.steps(config.out) == [8]
    assert train_alone(config)["step"] == 12
    assert checkpoint.steps(config.out) == [8, 12]


def test_a_run_whose_checkpoints_cannot_be_seen_loses_nothing(small_run, monkeypatch):
    config = small_run()
    train_alone(config)
    metrics = Path(config.out, "metrics.jsonl").read_bytes()
    read = files.read_bytes

    def fail(path):
        if path.endswith(checkpoint.MARKER):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(files, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train_alone(config)
    assert Path(config.out, "metrics.jsonl").read_bytes() == metrics


def test_directory_of_another_run_is_refused(small_run):
    train_alone(small_run())
    with pytest.raises(UserError, match=r"other settings \(train.lr: 0.01, now 0.02\)"):
        train_alone(small_run({"train.lr": 0.02}))
    free = {"train.log_every": 3, "train.keep": 1, "source.verify": False, "source.make_if_missing": True}
    assert train_alone(small_run(free))["step"] == 12


def test_run_directory_that_cannot_be_made_is_one_line(small_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        train_alone(small_run({"out": str(tmp_path / "file" / "run")}))
    assert "\n" not in str(error.value)


def test_store_without_the_sites_is_refused(small_run):
    with pytest.raises(UserError, match=r"no site resid_post\.0; it has: mlp_in\.0, "):
        train_alone(small_run({"dictionary.wiring": {"kind": "sae"}}))


def test_a_store_of_another_model_is_refused(small_run, tmp_path):
    train_alone(small_run({"model.name": "elsewhere/tiny"}))  # where it lies does not matter
    with pytest.raises(UserError, match=r"model\.name: gpt2; the activations in .*store are of tiny"):
        train_alone(small_run({"model.name": "gpt2", "out": str(tmp_path / "other")}))


def test_not_finite_activations_stop_the_run(small_run, tmp_path):
    """Pitfall 18: a NaN loss is never passed over."""
    config = small_run({"source.verify": False})
    with h5py.File(tmp_path / "store/chunk_1.hdf5", "r+") as file:
        file["layer_1/inputs"][3, 2] = 0x7FC0  # a bfloat16 NaN
    with pytest.raises(Diverged, match="gradient norm is nan"):
        train_alone(config)
    assert checkpoint.steps(config.out) == []


@pytest.mark.parametrize("kind", ["mean", "geometric_median"])
def test_bias_starts_where_it_is_told(small_run, kind):
    config = small_run({"dictionary.bias_init": kind, "dictionary.normalization.center": False, "train.lr": 1e-12})
    train_alone(config)
    zeros = small_run({"out": config.out + "_zeros", "train.lr": 1e-12, "dictionary.normalization.center": False})
    train_alone(zeros)
    bias = [checkpoint.load_dictionary(c.out)[0].b_dec for c in (config, zeros)]
    assert bias[0].abs().max() > 0.1
    assert bias[1].abs().max() < 1e-6


def test_the_bias_is_of_as_many_rows_as_calibration_tokens_says(small_run, monkeypatch):
    read, found = source.first_rows, []

    def noted(*args):
        found.append(read(*args))
        return found[-1]

    monkeypatch.setattr(source, "first_rows", noted)
    train_alone(small_run({"dictionary.bias_init": "mean", "train.calibration_tokens": 50, "train.steps": 1}))
    assert [{site: len(rows) for site, rows in one.items()} for one in found] == [{"mlp_out.0": 50}, {"mlp_out.1": 50}]


def test_reduced_precision_trains_and_keeps_float32_weights(small_run):
    last = train_alone(small_run({"train.precision": "bfloat16", "dictionary.products": "dense"}))
    full = train_alone(small_run({"out": small_run().out + "_32"}))
    assert last["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert last["loss"] != full["loss"]
    dictionary, _ = checkpoint.load_dictionary(small_run().out)
    assert dictionary.groups[0].W_enc.dtype == torch.float32


def test_run_directory_may_be_a_url(small_run):
    config = small_run({"out": "memory://runs/one"})
    train_alone(config)
    assert checkpoint.steps(config.out) == [8, 12]
    assert [line["step"] for line in logs.read(config.out)] == [1, 4, 8, 12]
    dictionary, again = checkpoint.load_dictionary(config.out)
    assert again == config
    assert not dictionary.training


def wandb_records(content: bytes):
    """What wandb's file holds: a header of 7 bytes, then records, of which 7 bytes say length and part (LevelDB)."""
    at, record = 7, b""
    while at + 7 < len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's end is filled up
            at += left
            continue
        size, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def test_wandb_offline_gets_every_line(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    train_alone(small_run({"train.wandb": {"project": "tests", "mode": "offline"}}))
    wandb.teardown()  # waits for the process that writes the file, finish() does not
    (written,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    settings, lines = {}, []
    for data in wandb_records(written.read_bytes()):
        record = Record.FromString(data)
        settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.history.item:
            lines.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert settings["dictionary"]["gate"]["kind"] == "batchtopk"
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["explained_variance"] for line in lines] == [line["explained_variance"] for line in logged]


def test_metrics_lines_hold_what_the_report_and_users_need(small_run):
    config = small_run()
    train_alone(config)
    lines = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    for key in ("step", "tokens", "loss", "reconstruction", "explained_variance", "l0", "dead_features", "lr"):
        assert all(key in line for line in lines)
    assert all(line["l0"] == pytest.approx(3.0) for line in lines)
    assert all(line["l0"] == pytest.approx(line["l0/group_0"] + line["l0/group_1"]) for line in lines)


def test_a_directory_whose_checkpoints_are_all_damaged_is_not_begun_anew(small_run):
    config = small_run()
    train_alone(config)
    for path in Path(config.out, "checkpoints").glob("step_*/.metadata"):
        path.unlink()
    metrics = Path(config.out, "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"damaged, passed over: \.metadata has 0 of [\d,]+ bytes; no other is left"):
        train_alone(config)
    assert Path(config.out, "metrics.jsonl").read_bytes() == metrics


def test_what_is_no_run_is_not_replaced_by_one(small_run, tmp_path):
    with pytest.raises(UserError, match=r"store: holds activations; choose another --out"):
        train_alone(small_run({"out": str(tmp_path / "store")}))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (theirs / name).write_text("lr: 1\n")
    with pytest.raises(UserError, match=r"theirs: its config\.yaml is of no run"):
        train_alone(small_run({"out": str(theirs)}))
    assert {path.name: path.read_text() for path in theirs.iterdir()} == dict.fromkeys(
        ("config.yaml", "metrics.jsonl"), "lr: 1\n"
    )


def test_more_features_asked_for_than_there_are_is_said_before_anything_starts(small_run):
    with pytest.raises(UserError, match=r"dictionary\.gate\.k: 99 exceeds the 48 features of all groups"):
        train_alone(small_run({"dictionary.gate.k": 99}))
