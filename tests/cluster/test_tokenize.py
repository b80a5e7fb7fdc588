"""Text read by one actor and packed by tasks: in order, whoever dies, and without more than was asked for."""

from __future__ import annotations

import os
import signal
from contextlib import closing

import numpy as np
import pytest

from tests.cluster.actors import actors
from xlc_ray.cluster.tokenize import Reader, pack_documents, tokenized


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config(tmp_path, {"generate.documents_per_task": 3})


def in_process(config, tasks: range):
    """What those tasks of a reader give, packed here."""
    reader = Reader(config.text, config.generate.documents_per_task)
    return [pack_documents(reader.read(task), config.model, config.text) for task in tasks]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {True, False}
        for split in one:
            (windows, mask), (others, other_mask) = one[split], other[split]
            np.testing.assert_array_equal(windows.tokens, others.tokens)
            np.testing.assert_array_equal(mask, other_mask)


def test_a_reader_gives_any_task_in_any_order(config):
    reader = Reader(config.text, 3)
    first = [reader.read(task) for task in range(4)]
    assert all(len(documents) == 3 for documents in first)
    assert reader.read(2) == first[2]  # asked again, as for a result that was lost
    assert Reader(config.text, 3).read(3) == first[3]  # started anew, in the middle
    assert reader.read(10**6) == []


@pytest.mark.cluster
def test_windows_come_in_order_when_the_reader_is_killed(cluster, config):
    found = []
    with closing(tokenized(config)) as stream:
        for _ in range(4):
            found.append(next(stream))
        (reader,) = actors("Reader")
        os.kill(reader.pid, signal.SIGKILL)
        for _ in range(16):
            found.append(next(stream))
        assert [other.pid for other in actors("Reader")] != [reader.pid]
    assert_same(found, in_process(config, range(20)))


@pytest.mark.cluster
def test_all_text_is_read_once_and_the_stream_ends(cluster, config):
    whole = config.override({"generate.documents_per_task": 300})
    found = list(tokenized(whole))
    assert_same(found, in_process(whole, range(len(found))))
    assert Reader(whole.text, 300).read(len(found)) == []
