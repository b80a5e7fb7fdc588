import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations.build import row_tokens
from xlc_ray.activations import text as T
from xlc_ray.config import Model, Text, UserError

MODEL = Model(name="configs/assets/tiny-austen-gpt2-d64")
DOCUMENTS = ["It is a truth universally acknowledged,", "that a single man", "", "in possession of a good fortune" * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return T.load_tokenizer(MODEL)


def ids(tokenizer, documents):
    eos = tokenizer.eos_token_id
    return [i for d in documents if d for i in [*tokenizer(d, add_special_tokens=False)["input_ids"], eos]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("context", [2, 7, 16])
def test_pack_drops_and_adds_no_token(tokenizer, bos, context):
    text = Text(dataset="x", context=context, prepend_bos=bos)
    windows = T.pack(DOCUMENTS, tokenizer, text)
    body = [row[bos:length] for row, length in zip(windows.tokens, windows.length, strict=True)]
    assert np.concatenate(body).tolist() == ids(tokenizer, DOCUMENTS)
    assert (windows.length[:-1] == context).all()
    assert windows.tokens.dtype == windows.length.dtype == np.int32
    if bos:
        assert (windows.tokens[:, 0] == tokenizer.bos_token_id).all()


def test_pack_of_nothing_is_no_window(tokenizer):
    windows = T.pack([], tokenizer, Text(dataset="x", context=8))
    assert windows.tokens.shape == (0, 8)
    assert len(windows.length) == 0


@pytest.mark.parametrize("bos", [True, False])
def test_packed_documents_that_hold_nothing_add_no_token(tokenizer, bos):
    text = Text(dataset="x", context=8, prepend_bos=bos)
    nothing = ["", None, [], *([[tokenizer.bos_token_id]] if bos else [])]
    assert len(T.pack(nothing, tokenizer, text)) == 0
    expected = T.pack(DOCUMENTS[:2], tokenizer, text)
    windows = T.pack([*nothing, DOCUMENTS[0], *nothing, DOCUMENTS[1], *nothing], tokenizer, text)
    assert np.array_equal(windows.tokens, expected.tokens)
    assert np.array_equal(windows.length, expected.length)


def test_windows_that_fit_exactly_leave_no_empty_one(tokenizer):
    count = len(ids(tokenizer, DOCUMENTS[:1]))
    windows = T.pack(DOCUMENTS[:1], tokenizer, Text(dataset="x", context=count, prepend_bos=False))
    assert windows.length.tolist() == [count]


def test_mask_leaves_out_padding_first_and_special(tokenizer):
    special = T.special_ids(tokenizer)
    text = Text(dataset="x", context=16, ignore_first=2)
    windows = T.pack(DOCUMENTS, tokenizer, text)
    mask = T.token_mask(windows, special, text)
    for row, length, kept in zip(windows.tokens, windows.length, mask, strict=True):
        assert kept.tolist() == [2 <= p < length and row[p] not in special for p in range(16)]
    everything = T.token_mask(windows, special, Text(dataset="x", context=16, ignore_first=0, ignore_special=False))
    assert everything.sum() == windows.length.sum()


def test_padding_is_out_even_though_its_id_may_be_a_real_token(tokenizer):
    text = Text(dataset="x", context=64, ignore_first=0, ignore_special=False)
    windows = T.pack(DOCUMENTS[:1], tokenizer, text)
    assert T.token_mask(windows, T.special_ids(tokenizer), text).sum() == windows.length[0] < 64


def test_held_out_is_a_share_and_duplicates_stay_together():
    documents = [f"document {i % 4000}" for i in range(8000)]
    chosen = [T.is_held_out(d, 0.1) for d in documents]
    assert 0.08 < np.mean(chosen) < 0.12
    train = {d for d, out in zip(documents, chosen, strict=True) if not out}
    assert train.isdisjoint({d for d, out in zip(documents, chosen, strict=True) if out})
    assert not any(T.is_held_out(d, 0.0) for d in documents)
    assert all(T.is_held_out(d, 1.0) for d in documents)


def stream_of(counts, context=8):
    """One (windows, mask) pair a task; kept tokens per window as asked, every token distinct."""
    first = 0
    for task in counts:
        tokens = (first + np.arange(len(task) * context, dtype=np.int32)).reshape(-1, context)
        first += tokens.size
        mask = np.arange(context) < np.array(task)[:, None]
        yield T.Windows(tokens, np.full(len(task), context, np.int32)), mask


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 60),
    st.integers(8, 30),
    st.integers(0, 3),
)
def test_plan_meets_the_total_exactly_with_distinct_tokens(counts, tokens, chunk_tokens, seed):
    available = sum(map(sum, counts))
    plan = T.chunk_plan(stream_of(counts), tokens, chunk_tokens, seed)
    if available < tokens:
        with pytest.raises(UserError, match=f"after {available} of {tokens} tokens"):
            list(plan)
        return
    chunks = list(plan)
    kept = np.concatenate([w.tokens[m] for w, m in stream_of(counts)])[:tokens]
    found = np.concatenate([row_tokens(c) for c in chunks])
    assert [c.index for c in chunks] == list(range(len(chunks)))
    assert all(0 < c.rows <= chunk_tokens for c in chunks)
    assert sorted(found.tolist()) == kept.tolist()  # exactly the first of the stream, each once
    windows = np.concatenate([c.windows.tokens[:, 0] for c in chunks])
    assert len(np.unique(windows)) == len(windows)  # a window never spans chunks


def test_rows_are_permuted_by_seed_and_index():
    one, two = (list(T.chunk_plan(stream_of([[8] * 20]), 150, 64, seed)) for seed in (1, 2))
    again = list(T.chunk_plan(stream_of([[8] * 20]), 150, 64, 1))
    assert all(np.array_equal(row_tokens(a), row_tokens(b)) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(row_tokens(one[0]), row_tokens(two[0]))
    assert not (np.diff(row_tokens(one[0])) > 0).all()
    mix = np.random.default_rng([1, 0]).permutation(64)
    assert np.array_equal(row_tokens(one[0]), np.sort(row_tokens(one[0]))[mix])


def test_window_larger_than_a_chunk_is_refused():
    with pytest.raises(UserError, match=r"generate\.chunk_tokens: 5 .* 8"):
        list(T.chunk_plan(stream_of([[8]]), 8, 5, 0))


def test_plan_reads_no_more_text_than_it_needs():
    def endless():
        yield from stream_of([[8, 8]])
        raise AssertionError("read on")

    assert sum(c.rows for c in T.chunk_plan(endless(), 12, 100, 0)) == 12


def test_paragraphs_become_documents(tmp_path):
    (tmp_path / "b.txt").write_text("four\n")
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\n two\n \t\nthree\n")
    text = Text(dataset=str(tmp_path), paragraphs=2)
    assert list(T.load_documents(text)["text"]) == ["one\nstill one\n\n two", "three", "four"]
    single = text.model_copy(update={"dataset": str(tmp_path / "*b.txt")})
    assert list(T.load_documents(single)["text"]) == ["four"]


def save(tmp_path, kind):
    rows = {"title": ["t", "u"], "body": ["first", "second"], "n": [1, 2]}
    made = datasets.Dataset.from_dict(rows)
    if kind == "saved":
        datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
        return str(tmp_path / "saved")
    path = str(tmp_path / f"x.{kind}")
    if kind == "jsonl":
        records = [dict(zip(rows, r, strict=True)) for r in zip(*rows.values(), strict=True)]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    else:
        {"csv": made.to_csv, "parquet": made.to_parquet}[kind](path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_local_files_and_saved_datasets(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = save(tmp_path, kind)
    assert list(T.load_documents(Text(dataset=path, column="body"))["body"]) == ["first", "second"]
    with pytest.raises(UserError, match=r"text\.column: 'text' .*allowed: body, n, title"):
        T.load_documents(Text(dataset=path))
    with pytest.raises(UserError, match=r"text\.column: 'n' .* not text"):
        T.load_documents(Text(dataset=path, column="n"))


def test_a_stream_of_local_files_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = T.load_documents(Text(dataset=save(tmp_path, "jsonl"), column="body", streaming=True))
    assert isinstance(found, datasets.IterableDataset)
    assert [row["body"] for row in found] == ["first", "second"]


def test_missing_split_names_the_others(tmp_path):
    with pytest.raises(UserError, match=r"text\.split: 'test' .*allowed: train"):
        T.load_documents(Text(dataset=save(tmp_path, "saved"), split="test", column="body"))


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("./nowhere", "no file or directory"),
        ("nowhere.jsonl", "no file or directory"),
        ("nowhere/*.txt", "holds none of"),
        ("nobody/nothing", "'nobody/nothing' cannot be loaded"),
    ],
)
def test_text_that_is_not_there_is_one_line(dataset, match):
    with pytest.raises(UserError, match=match) as error:
        T.load_documents(Text(dataset=dataset))
    assert "\n" not in str(error.value)
    assert dataset in str(error.value)


def test_mixed_kinds_and_other_encodings_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        T.load_documents(Text(dataset=str(tmp_path)))
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"mixes \.csv, \.txt"):
        T.load_documents(Text(dataset=str(tmp_path)))


@pytest.mark.parametrize("name", ["./no-model", "/no/model", "configs", "nobody/no-model"])
def test_missing_model_is_one_line(name):
    with pytest.raises(UserError, match=r"model\.name") as error:
        T.load_tokenizer(Model(name=name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("kept", [("config.json", "tokenizer_config.json"), ("config.json",)])
def test_a_model_without_its_tokenizer_is_one_whole_line(tmp_path, kept):
    for name in kept:
        shutil.copy(Path(MODEL.name) / name, tmp_path)
    with pytest.raises(UserError, match=r"model\.name: .*tokenizer.*[^:\s]$") as error:
        T.load_tokenizer(Model(name=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_reason_of_many_lines_is_told_whole():
    class Broken:
        @staticmethod
        def from_pretrained(*_, **__):
            raise ValueError("it needs one of:\n(1) this\n(2) that")

    with pytest.raises(UserError, match=r"it needs one of: \(1\) this \(2\) that$"):
        T.from_pretrained(Broken, MODEL, "tokenizer")


def test_text_that_ends_too_early_names_the_settings_of_both_splits():
    with pytest.raises(UserError, match=r"0 of 60 .*generate\.tokens.*text\.held_out_fraction.*held_out_tokens"):
        list(T.chunk_plan([], 60, 10, 0))
