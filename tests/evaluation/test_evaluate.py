"""eval.json from a real store, and the report and table made of it."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from xlc_ray import files
from xlc_ray.activations.harvest import LanguageModel
from xlc_ray.config import UserError
from xlc_ray.dictionary import Shards
from xlc_ray.dictionary.build import build, make_wiring
from xlc_ray.evaluation import evaluate, measure, run, table
from xlc_ray.evaluation.held_out import held_out_batches, held_out_windows
from xlc_ray.evaluation.report import write_report

HEADLINE = ["explained_variance", "fvu", "l0", "dead_features", "ce_recovered", "kl", "top1_agreement"]


@pytest.fixture(scope="module")
def evaluation(dictionary, config, store):
    return evaluate(dictionary, config, store)


def test_holds_every_promised_number_as_json(evaluation):
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    assert list(evaluation)[:7] == HEADLINE
    assert all(isinstance(evaluation[name], float) for name in HEADLINE)
    assert list(evaluation["sites"]) == [f"mlp_out.{n}" for n in range(4)]
    assert evaluation["groups"][1]["reads"] == ["mlp_in.1"]
    assert evaluation["groups"][1]["writes"] == ["mlp_out.1", "mlp_out.2", "mlp_out.3"]
    assert sum(evaluation["feature_density"]["total"]) == 4 * 32
    assert evaluation["tokens"] == 600
    assert evaluation["replacement"]["windows"] == 12
    assert evaluation["kl"] == evaluation["replacement"]["all"]["kl"]


def test_features_and_core_metrics_agree_with_the_evaluation(dictionary, config, store, evaluation):
    found = measure(dictionary, config.override({"evaluate.ablate_features": 3}), store)
    ablated = found.evaluation.pop("ablated_features")
    assert found.evaluation | {"ablated_features": []} == evaluation
    rows = found.features.to_pylist()
    assert sum(row["density"] for row in rows) == pytest.approx(evaluation["l0"])
    assert sum(row["dead"] for row in rows) / len(rows) == evaluation["dead_features"]
    assert len(ablated) == 3
    assert not any(rows[one["group"] * 32 + one["feature"]]["dead"] for one in ablated)
    core, site = found.core["eval_result_metrics"], evaluation["sites"]["mlp_out.1"]
    assert core["sparsity"]["l0"] == pytest.approx(evaluation["l0"])
    assert core["model_performance_preservation"]["ce_loss_score"] == evaluation["ce_recovered"]
    assert core["token_stats"]["total_tokens_eval_sparsity_variance"] == 600
    assert found.core["sites"]["mlp_out.1"]["reconstruction_quality"]["cossim"] == site["cosine_similarity"]
    text = table(found.evaluation | {"ablated_features": ablated})
    assert f"group {ablated[0]['group']} feature {ablated[0]['feature']} " in text


@pytest.mark.parametrize("size", [128, 100])
def test_rows_come_in_batches_as_large_as_the_settings_say(dictionary, config, store, monkeypatch, size):
    sizes = []

    def noted(*args):
        for batch in held_out_batches(*args):
            sizes.append(len(batch["mlp_out.2"]))
            yield batch

    monkeypatch.setattr(run, "held_out_batches", noted)
    evaluate(dictionary, config.override({"evaluate.windows": 0, "evaluate.batch_tokens": size}), store)
    assert (max(sizes), sum(sizes)) == (size, 600)


def test_ablation_needs_windows(dictionary, config, store):
    with pytest.raises(UserError, match=r"evaluate\.ablate_features: needs the replacement model"):
        evaluate(dictionary, config.override({"evaluate.windows": 0, "evaluate.ablate_features": 1}), store)


def test_batches_are_the_first_rows_each_once(store):
    for most in (1, 299, 420, 10_000):
        parts = list(held_out_batches(store, ["mlp_out.2"], 128, most))
        found = torch.cat([part["mlp_out.2"] for part in parts])
        chunks = [store.read(c, 0, n, ["mlp_out.2"])["mlp_out.2"] for c, n in enumerate(store.chunk_rows)]
        assert np.array_equal(found.numpy(), np.concatenate(chunks)[:most])
        assert max(len(part["mlp_out.2"]) for part in parts) <= 128


def test_windows_keep_exactly_the_stored_rows(store, config):
    batches = list(held_out_windows(store, 5, 10_000, "cpu"))
    assert sum(int(batch.keep.sum()) for batch in batches) == store.manifest.tokens == 700
    assert not any(batch.keep[:, 0].any() for batch in batches)  # ignore_first = 1
    few = list(held_out_windows(store, 5, 12, "cpu"))
    assert sum(len(batch.tokens) for batch in few) == 12
    assert max(len(batch.tokens) for batch in few) == 5


def test_replacement_sees_what_the_store_holds(store, config):
    """The kept rows of a forward pass over the windows are the stored rows: evaluation and training see one thing."""
    model = LanguageModel(config.model)
    text = store.windows(0)
    stored = store.read(0, 0, store.chunk_rows[0], ["mlp_out.3"])["mlp_out.3"]
    found = model.harvest(torch.from_numpy(text.windows.tokens), torch.from_numpy(text.windows.length), ["mlp_out.3"])
    assert np.allclose(found["mlp_out.3"][text.row_window, text.row_position].numpy(), stored, atol=1e-5)


def test_without_windows_there_is_no_replacement(dictionary, config, store):
    found = evaluate(dictionary, config.override({"evaluate.windows": 0}), store)
    assert found["replacement"] is None
    assert found["ce_recovered"] is found["kl"] is found["top1_agreement"] is None
    assert found["l0"] > 0
    assert "n/a" in table(found)


def test_a_lacking_site_is_named(config, store):
    wires = make_wiring(config.override({"dictionary.wiring": {"kind": "sae"}}).dictionary.wiring, 4, 64)
    other = build(config.dictionary, wires, 0, Shards())
    with pytest.raises(UserError, match=r"has no site resid_post\.0; it has: mlp_in\.0"):
        evaluate(other, config, store)


def test_activations_of_another_model_are_named(config, store):
    """Of another width, and of the same width, where nothing else would show it."""
    wires = make_wiring(config.dictionary.wiring, 4, 48)
    other = build(config.dictionary, wires, 0, Shards())
    with pytest.raises(UserError, match=r"mlp_in\.0 of the held-out store .* is 64 wide, that of the dictionary 48;"):
        evaluate(other, config, store)
    fitting = build(config.dictionary, make_wiring(config.dictionary.wiring, 4, 64), 0, Shards())
    with pytest.raises(UserError, match=r"model\.name: gpt2; the activations in .* are of .*tiny-austen-gpt2-d64"):
        evaluate(fitting, config.override({"model.name": "gpt2"}), store)


def test_table_is_aligned_and_complete(evaluation):
    lines = table(evaluation).splitlines()
    assert [line.split()[0] for line in lines[:7]] == HEADLINE
    assert all(
        line[27] != " " and line[28:30] == "  " and line[30] != " " for line in lines[:7]
    )  # flush right, then text
    sites = lines[9:14]
    assert [line.split("  ")[0] for line in sites] == [
        "mlp_out.0",
        "mlp_out.1",
        "mlp_out.2",
        "mlp_out.3",
        "all at once",
    ]
    assert len({len(line) for line in sites}) == 1
    assert f"{evaluation['ce_recovered']:.4f}" in sites[-1]
    assert "600 held-out tokens" in lines[-1]


def lines(count=20):
    return [
        {"step": n, "tokens": n * 8, "loss": 50 / n, "l0": 4.0, "explained_variance": 1 - 1 / n, "dead_features": 0.0,
         "lr": 1e-3, "auxk": 0.25, "note": "text", "tokens_per_s": 900.5}
        for n in range(1, count)
    ]  # fmt: skip


class Checker(HTMLParser):
    """Balanced tags, and what a page would fetch."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = files.read_bytes(path).decode()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return page, checker


def test_report_needs_nothing_from_outside(tmp_path, config, evaluation):
    path = write_report(str(tmp_path), config, lines(), evaluation)
    assert path == f"{tmp_path}/report.html"
    page, checker = read(path)
    assert checker.outside == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(checker.tags)
    assert "@import" not in page
    assert "url(http" not in page
    assert checker.tags.count("svg") == 4  # curves, other curves, bars, density
    assert "DejaVu" not in page
    assert not any(colour in page for colour in ("#010101", "#020202", "#030303", "#040404"))
    text = " ".join(checker.text)
    assert {"0.1 %", "1 %", "100 %"} <= set(checker.text)
    assert "1e-" not in text  # shares, all in the same unit
    assert "Cross-layer transcoder of tiny-austen-gpt2-d64" in text
    for name, form in {"explained_variance": ".4f", "l0": ".1f", "top1_agreement": ".1%"}.items():
        assert format(evaluation[name], form).replace("-", "\u2212").replace("%", "\u2009%") in text
    assert f"{evaluation['replacement']['sites']['mlp_out.2']['ce_replaced']:.4f}" in text
    assert "auxk" in text
    assert "batchtopk" in text


def test_report_is_reproducible_and_the_later_line_of_a_step_counts(tmp_path, config, evaluation):
    clean = write_report(str(tmp_path / "a"), config, lines(), evaluation)
    resumed = lines()[:12] + [{**line, "loss": line["loss"]} for line in lines()[6:]]
    resumed[9] = {**resumed[9], "loss": 1e9}  # a line that the resumed run wrote again
    assert files.read_bytes(clean) == files.read_bytes(write_report(str(tmp_path / "b"), config, resumed, evaluation))


def test_report_of_a_bare_evaluation(tmp_path, config, evaluation):
    bare = evaluation | {"replacement": None, "ce_recovered": None, "kl": None, "top1_agreement": None}
    page, checker = read(write_report(str(tmp_path), config, [], bare))
    assert "Replacement model" not in page
    assert "Training" not in checker.text
    assert "n/a" in checker.text


def test_report_escapes_what_a_user_wrote(tmp_path, config, evaluation):
    named = config.override({"text.dataset": "<b>&books</b>"})
    page, _ = read(write_report(str(tmp_path), named, lines(), evaluation))
    assert "<b>" not in page
    assert "&amp;books" in page
