"""What a column may hold, how datasets are mixed, and what windows become of it."""

from __future__ import annotations

import itertools
import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations.build import CHAT_TEMPLATE
from xlc_ray.activations import text as T
from xlc_ray.activations.documents import column_kind, interleave, load_documents, read_documents
from xlc_ray.config import Model, Text, UserError

MODEL = Model(name="configs/assets/tiny-austen-gpt2-d64")
CHAT = [{"role": "user", "content": "Who is rich?"}, {"role": "assistant", "content": "Emma is."}]
RENDERED = "<user>Who is rich?\n<assistant>Emma is.\n"


@pytest.fixture
def tokenizer():
    return T.load_tokenizer(MODEL)


@pytest.fixture
def chatty(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(tmp_path, name, count) -> str:
    return write(tmp_path / f"{name}.jsonl", [{name: f"{name}{i}"} for i in range(count)])


def mixture(*parts, **changes) -> Text:
    return Text.model_validate({"mixture": parts, **changes})


# Mixtures


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 200))
def test_shares_hold_from_the_first_documents_on(weights, count):
    found = list(itertools.islice(interleave([itertools.repeat(i) for i in range(len(weights))], weights), count))
    for n in (count, count // 2, count // 3):
        for i, weight in enumerate(weights):
            behind = n * weight / sum(weights) - found[:n].count(i)
            assert -1 < behind < max(len(weights) - 1, 1e-6)


def test_equal_weights_alternate_and_no_document_is_lost_or_repeated():
    found = list(interleave([range(40), range(100, 140)], [3, 3]))
    assert found[:4] == [0, 100, 1, 101]
    assert sorted(found) == [*range(40), *range(100, 140)]


def test_a_mixture_ends_with_the_first_dataset_whose_turn_finds_nothing():
    # Going on would change the shares; beginning again would repeat documents.
    assert list(interleave([["a"] * 10, ["b"] * 2], [1, 1])) == ["a", "b", "a", "b", "a"]
    assert list(interleave([[], ["b"]], [1, 1])) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_of_a_mixture_have_their_own_columns(tmp_path, streaming):
    parts = [
        {"dataset": lines(tmp_path, "a", 6), "column": "a", "weight": 2},
        {"dataset": lines(tmp_path, "b", 6), "column": "b"},
    ]
    found = list(read_documents(mixture(*parts, streaming=streaming)))
    assert found[:6] == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert found == list(read_documents(mixture(*parts, streaming=streaming)))
    heavier = mixture(parts[0] | {"weight": 5}, parts[1], streaming=streaming)
    assert list(read_documents(heavier)) != found


def test_splits_and_subsets_of_a_mixture_are_its_datasets_own(tmp_path):
    made = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    parts = [{"dataset": str(tmp_path / "saved"), "split": name} for name in made]
    assert list(read_documents(mixture(*parts))) == ["train", "test"]
    with pytest.raises(UserError, match="'nowhere/at_all' cannot be loaded"):
        T.check_documents(mixture(parts[0], {"dataset": "nowhere/at_all", "subset": "en"}), None)


def test_mixture_survives_its_yaml_and_renames_each_dataset():
    text = mixture({"dataset": "a"}, {"dataset": "b", "weight": 2.0})
    assert Text.model_validate_json(text.model_dump_json()) == text
    (renamed,) = text.renamed(str.upper).values()
    assert [(part["dataset"], part["weight"]) for part in renamed] == [("A", 1.0), ("B", 2.0)]
    assert [(part.dataset, part.mixture) for part in text.parts()] == [("a", None), ("b", None)]


# Windows


def test_one_document_a_window_cut_and_padded(tokenizer):
    documents = ["Emma", "", None, "in possession of a good fortune " * 9, "Emma Woodhouse"]
    text = Text(dataset="x", context=12, windows="one_per_document")
    windows, bos = T.pack(documents, tokenizer, text), tokenizer.bos_token_id
    expected = [[bos, *tokenizer(d)["input_ids"]][:12] for d in documents if d]
    assert [row[:n].tolist() for row, n in zip(windows.tokens, windows.length, strict=True)] == expected
    assert windows.length[1] == 12
    assert windows.length[0] < 12
    beyond = np.arange(12) >= windows.length[:, None]
    assert (windows.tokens[beyond] == 0).all()
    for ignore_special in (True, False):
        kept = text.model_copy(update={"ignore_special": ignore_special, "ignore_first": 0})
        assert not T.token_mask(windows, T.special_ids(tokenizer), kept)[beyond].any()
    bare = T.pack(documents, tokenizer, text.model_copy(update={"prepend_bos": False}))
    assert bare.tokens[0, 0] == expected[0][1]


def test_windows_of_one_document_do_not_depend_on_their_neighbours(tokenizer):
    documents = ["Emma", "a truth universally acknowledged", "fortune"]
    text = Text(dataset="x", context=16, windows="one_per_document")
    whole = T.pack(documents, tokenizer, text).tokens
    assert np.array_equal(whole, np.concatenate([T.pack([d], tokenizer, text).tokens for d in documents]))


# Token ids


def test_token_ids_give_the_windows_of_their_text(tokenizer):
    documents = ["Emma Woodhouse, handsome", "clever, and rich", ""]
    given_ids = [tokenizer(d)["input_ids"] for d in documents]
    eos = tokenizer.eos_token_id
    ended = [[eos, *ids, eos] for ids in given_ids[:2]] + [None]  # as tokenised text often comes
    for windows in ("packed", "one_per_document"):
        text = Text(dataset="x", context=24, windows=windows)
        expected = T.pack(documents, tokenizer, text)
        assert np.array_equal(T.pack(given_ids, tokenizer, text).tokens, expected.tokens)
        if windows == "packed":  # no BOS or EOS twice
            assert np.array_equal(T.pack(ended, tokenizer, text).tokens, expected.tokens)


@pytest.mark.parametrize(("ids", "shown"), [([5, 1024], "1024"), ([3, -1], "-1")])
def test_token_ids_of_another_vocabulary_are_refused(tokenizer, ids, shown):
    text = Text(dataset="books", column="ids")
    with pytest.raises(UserError, match=rf"'ids' of books: token id {shown} .* allowed: 0 to 1023"):
        T.pack([[1, 2], ids], tokenizer, text)


@pytest.mark.parametrize("ids", [[None], [3, None]])
def test_token_ids_that_are_null_are_refused(tmp_path, tokenizer, ids):
    path = write(tmp_path / "x.jsonl", [{"ids": [1, 2]}, {"ids": ids}])
    text = Text(dataset=path, column="ids")
    with pytest.raises(UserError, match=r"'ids' of .*: token id null is not of any tokenizer; allowed: 0 to 1023"):
        T.pack(list(read_documents(text)), tokenizer, text)


def test_token_ids_that_are_windows_must_fit(tokenizer):
    text = Text(dataset="x", context=8, windows="one_per_document")
    assert T.pack([[5] * 7, [tokenizer.bos_token_id, *[5] * 7]], tokenizer, text).length.tolist() == [8, 8]
    with pytest.raises(UserError, match=r"8 token ids do not fit .*text\.context = 8; allowed: at least 9"):
        T.pack([[5] * 8], tokenizer, text)
    assert len(T.pack([[5] * 8], tokenizer, text.model_copy(update={"windows": "packed"}))) == 2


# Messages


def test_messages_are_rendered_by_the_chat_template(chatty):
    text = Text(dataset="x", context=64)
    assert np.array_equal(T.pack([CHAT], chatty, text).tokens, T.pack([RENDERED], chatty, text).tokens)


def test_a_template_that_begins_with_bos_gives_one_bos(chatty):
    chatty.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    text = Text(dataset="x", context=64, windows="one_per_document")
    (window,) = T.pack([CHAT], chatty, text).tokens
    assert np.array_equal(window, T.pack([RENDERED], chatty, text).tokens[0])
    assert window[1] != chatty.bos_token_id
    own = T.pack([CHAT], chatty, text.model_copy(update={"prepend_bos": False})).tokens[0]
    assert np.array_equal(own, window), "the template's own"


def test_no_template_is_said_before_anything_is_read(tmp_path, tokenizer):
    path = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    text = Text(dataset=path, column="messages")
    with pytest.raises(UserError, match=r"'messages' of .* the tokenizer of .*d64 has no chat template; give a model"):
        T.check_documents(text, tokenizer)
    with pytest.raises(UserError, match="has no chat template"):
        T.pack([CHAT], tokenizer, text)


def test_conversations_that_a_template_refuses_name_their_roles(chatty):
    chatty.chat_template = "{{ raise_exception('Roles must\nalternate') }}"
    with pytest.raises(UserError, match=r"refuses messages of user, assistant: Roles must alternate"):
        T.pack([CHAT], chatty, Text(dataset="x"))


def test_content_in_parts_that_a_template_takes_for_text_is_one_line(chatty):
    chatty.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who is rich?"}]}]
    with pytest.raises(UserError, match=r"'text' of x: the chat template of .* refuses messages of user: .*list"):
        T.pack([parts], chatty, Text(dataset="x"))


@pytest.mark.parametrize("streaming", [False, True])
def test_keys_that_other_messages_have_are_absent_from_the_rest(tmp_path, chatty, streaming):
    named = [{"role": "user", "content": "Sir!", "name": "Emma"}]
    path = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": named}])
    found = list(read_documents(Text(dataset=path, column="messages", streaming=streaming)))
    assert found == [CHAT, named]
    chatty.chat_template = "{% for m in messages %}{{ m.name if m.name is defined else 'nobody' }}.{% endfor %}"
    assert chatty.decode(T.token_ids(found, chatty, Text(dataset="x"))[0]) == "nobody.nobody."


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "held"),
    [
        ([{"from": "human", "value": "x"}], "from"),
        ([{"from": "human"}, {"role": "user", "content": "x"}], "human"),
        ([[1, 2]], "(List|1, 2)"),
        ({"role": "user", "content": "x"}, "role"),
        ([1.5], "(float64|1.5)"),
        (3, "(int64|3)"),
    ],
)
def test_columns_that_hold_something_else_say_what(tmp_path, value, held, streaming):
    path = write(tmp_path / "x.jsonl", [{"it": value}])
    with pytest.raises(UserError, match=f"'it' of .* holds .*{held}.*not text, nor lists of token ids or of messages"):
        load_documents(Text(dataset=path, column="it", streaming=streaming))


def test_a_stream_that_begins_with_nothing_is_known_by_what_follows(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"ids": None}, {"ids": []}, {"ids": [3, 4]}])
    text = Text(dataset=path, column="ids", streaming=True)
    assert column_kind(load_documents(text), text) == "token ids"
    empty = Text(dataset=write(tmp_path / "y.jsonl", [{"ids": None}]), column="ids", streaming=True)
    with pytest.raises(UserError, match=r"holds (None|null), not text"):
        load_documents(empty)


@pytest.mark.parametrize("document", [5, 0, ["x"], [1, True], [CHAT[0], None], {"role": "user"}])
def test_documents_of_another_kind_than_the_first_are_refused(tokenizer, document):
    with pytest.raises(UserError, match=r"'text' of x holds .*, not text, nor lists of token ids or of messages"):
        T.pack(["Emma", document], tokenizer, Text(dataset="x"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", b"", "has no rows"),
        ("x.txt", b" \n", "has no rows"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', "cannot be loaded: 'utf-8' codec can't decode"),
        ("x.jsonl", b'{"text": "a"}\n' * 100 + b'{"text":\n', "cannot be loaded: JSON parse error"),
        ("x.csv", b"", "cannot be loaded: No columns"),
    ],
)
def test_files_that_are_damaged_are_one_line(tmp_path, name, content, match, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"text\.dataset: .*{name}.* {match}") as error:
        list(read_documents(Text(dataset=str(tmp_path / name), streaming=streaming)))
    assert "\n" not in str(error.value)


def test_a_line_that_is_damaged_far_behind_is_one_line_of_the_stream(tmp_path):
    rows = json.dumps({"text": "Emma " * 200}) + "\n"
    (tmp_path / "x.jsonl").write_text(rows * 12_000 + '{"text":\n')
    stream = read_documents(Text(dataset=str(tmp_path / "x.jsonl"), streaming=True))
    assert next(stream)
    with pytest.raises(UserError, match=r"text\.dataset: .*x\.jsonl.* cannot be loaded: JSON parse error"):
        list(stream)


@pytest.mark.parametrize("name", ["dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_saved_dataset_of_which_a_part_is_missing_is_one_line(tmp_path, name):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / name).unlink()
    with pytest.raises(UserError, match=r"text\.dataset: .*saved' cannot be loaded: "):
        load_documents(Text(dataset=str(tmp_path / "saved")))


def test_documents_of_any_kind_have_a_held_out_share():
    for documents in ([[i, 7] for i in range(3000)], [[{"role": "user", "content": str(i)}] for i in range(3000)]):
        chosen = [T.is_held_out(d, 0.2) for d in documents]
        assert 0.16 < np.mean(chosen) < 0.24
        assert chosen == [T.is_held_out(json.loads(json.dumps(d)), 0.2) for d in documents]
