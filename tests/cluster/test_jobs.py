"""Jobs with options of their own: where what they make goes, and whose defaults they have. No cluster is started."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.config.tree import ROOT
from xlc_ray.activations import medical, store
from xlc_ray.cluster.session import output_path
from xlc_ray.config.activations import Generate, Text


@pytest.fixture
def job(monkeypatch, capsys, tmp_path):
    """Run a job in this process: (exit status, output, errors)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # jobs put in their own
    monkeypatch.setenv("XLC_ROOT", str(tmp_path / "root"))

    def run(name: str, *words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", *words])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / f"jobs/{name}.py"), run_name="__main__")
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("x/y", "/root/x/y"),
        ("file://x/y", "/root/x/y"),
        ("/tmp/x", "/tmp/x"),
        ("file:///tmp/x", "/tmp/x"),
        ("~/x", "/home/someone/x"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_what_is_made_goes_to_a_url_or_an_absolute_local_path(monkeypatch, given, found):
    monkeypatch.setenv("XLC_ROOT", "/root")
    monkeypatch.setenv("HOME", "/home/someone")
    assert output_path(given) == found


@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///tmp/x", "x"])
def test_every_job_with_an_out_takes_urls_and_local_paths(job, monkeypatch, tmp_path, url):
    asked = []

    def made(*args, **how):
        asked.append(how["out"] if "out" in how else next(a for a in args if a in (url, "/tmp/x", str(root / "x"))))
        return SimpleNamespace(tokens=1, sites={}, chunks=())

    root = tmp_path / "root"
    monkeypatch.setattr("xlc_ray.export.run.export", made)
    monkeypatch.setattr("xlc_ray.cluster.shuffle.shuffle", made)
    monkeypatch.setattr(medical, "prepare", lambda *args: made(*args) and {})
    monkeypatch.setattr("xlc_ray.activations.importing.import_store", lambda *args, **how: {False: made(*args)})
    assert job("export", "--run", "r", "--format", "saelens", "--out", url)[0] == 0
    assert job("shuffle", "--store", "s", "--out", url)[0] == 0
    assert job("prepare_text", "--out", url)[0] == 0
    assert job("import_store", "--out", url, "--model", "m", "--site", "mlp_in.0=x.npy")[0] == 0
    assert asked == [{"x": str(root / "x"), "file:///tmp/x": "/tmp/x"}.get(url, url)] * 4


def test_a_corpus_at_a_url_is_refused_in_a_line(job, tmp_path):
    status, _, said = job("prepare_text", "--out", "s3://bucket/corpus")
    assert status == 2
    assert said == "error: --out: 's3://bucket/corpus' should be a local directory that does not exist yet\n"
    assert not (tmp_path / "root").exists()


def test_an_import_has_the_defaults_of_the_settings_and_says_what_it_made(job, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    words = ("--model", "tiny", "--site", f"mlp_in.0={tmp_path / 'x.npy'}")
    status, said, _ = job("import_store", "--out", f"file://{tmp_path / 'store'}", *words)
    assert status == 0
    lines = said.splitlines()
    assert lines[-3].startswith("38 training rows, ")
    assert lines[-2].startswith("2 held-out rows, ")
    assert lines[-1] == f"mlp_in.0 at {tmp_path / 'store'}"
    identity = store.open_store(str(tmp_path / "store")).manifest.identity
    share, rows = Text.model_fields["held_out_fraction"].default, Generate.model_fields["chunk_tokens"].default
    assert (identity["held_out_fraction"], identity["chunk_tokens"]) == (share, rows)
    helped = job("import_store", "--help")[1]
    assert f"({share})" in helped
    assert f"({rows})" in helped
