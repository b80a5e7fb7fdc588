"""The disk cache: its bound, what goes first, and many processes at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xlc_ray.activations.cache import DiskCache
from xlc_ray.config import UserError

WRITER = """
import random, sys
from xlc_ray.activations.cache import DiskCache
cache, rng = DiskCache(sys.argv[1], 20_000), random.Random(int(sys.argv[2]))
for _ in range(400):
    n = rng.randrange(60)
    data = bytes([n]) * (500 + 10 * n)
    found = cache.get(f"key {n}", len(data))
    assert found in (None, data), "another block's bytes"
    if found is None:
        cache.put(f"key {n}", data)
"""


def held(path) -> int:
    return sum(block.stat().st_size for block in path.glob("??/*"))


def test_the_longest_unused_go_first(tmp_path):
    cache = DiskCache(str(tmp_path), 1000)
    for n, key in enumerate("abcdefghij"):
        cache.put(key, bytes(100))
        os.utime(cache._place(key), (n, n))
    assert cache.get("a", 100)  # used again: b is now the oldest
    cache.put("k", bytes(100))
    kept = "".join(key for key in "abcdefghijk" if cache.get(key, 100) is not None)
    assert kept == "acdefghijk"


def test_a_block_put_again_counts_once(tmp_path):
    cache = DiskCache(str(tmp_path), 1000)
    for _ in range(50):
        cache.put("same", bytes(300))
    cache.put("other", bytes(600))
    assert cache.get("same", 300) is not None
    assert cache.get("other", 600) is not None


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path):
    cache = DiskCache(str(tmp_path), 1000)
    cache.put("small", bytes(900))
    cache.put("large", bytes(1001))
    assert cache.get("large", 1001) is None
    assert cache.get("small", 900) is not None


def test_after_a_crash_the_total_is_counted_anew(tmp_path):
    cache = DiskCache(str(tmp_path), 1000)
    cache.put("a", bytes(400))
    (tmp_path / "total").write_text("7000")
    cache.put("b", bytes(500))
    assert held(tmp_path) == 900
    assert int((tmp_path / "total").read_text()) == 900


def test_processes_share_it_within_its_bound(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(seed)]) for seed in range(3)]
    while any(writer.poll() is None for writer in writers):
        blocks = []
        for block in tmp_path.glob("??/*"):
            try:
                blocks.append(block.stat().st_size)
            except FileNotFoundError:
                continue  # evicted as we looked
        assert len(blocks) < 60
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert 0 < held(tmp_path) <= 20_000
    assert int((tmp_path / "total").read_text()) == held(tmp_path)
    assert not list(tmp_path.glob("??/*.part"))


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/cache: cannot be written: Not a directory"):
        DiskCache(str(tmp_path / "file/cache"), 1000).put("a", b"x")
    assert DiskCache(str(tmp_path / "file/cache"), 1000).get("a", 1) is None  # after which `put` tells
