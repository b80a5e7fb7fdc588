"""A process that makes no step ends, and says where it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from xlc_ray.cluster import watchdog

ROOT = Path(__file__).parents[2]
HUNG = """
import ctypes, sys, threading, time
from xlc_ray.cluster import watchdog

watchdog.GRACE = 0.5

def stuck():
    {how}

with watchdog.Watchdog(0.5, sys.argv[1], 3) as watched:
    watched.beat(17)
    stuck()
print("went on")
"""


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", HUNG.format(how=how), str(folder)]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_thread_that_waits_in_c_is_ended_and_its_stack_is_left(tmp_path):
    done = run(tmp_path, "lock = threading.Lock(); lock.acquire(); lock.acquire()")
    assert done.returncode != 0
    assert "went on" not in done.stdout
    text = (tmp_path / "rank_3.txt").read_text()
    assert text.startswith("rank 3 (")
    assert "after step 17, in " in text
    assert "in stuck" in text.split("thread ")[1], "the watched thread comes first"
    assert "watchdog" in text, "the others follow"
    (line,) = watchdog.first_lines(str(tmp_path))
    assert line == text.splitlines()[0]


def test_the_first_step_may_take_longer(tmp_path):
    done = run(
        tmp_path, "watched._allowed = 5; time.sleep(1.5); [(watched.beat(n), time.sleep(0.2)) for n in range(5)]"
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert watchdog.Watchdog(20.0, str(tmp_path), 0)._allowed == watchdog.START
    assert watchdog.Watchdog(600.0, str(tmp_path), 0)._allowed == 600


def test_a_process_that_never_releases_the_interpreter_is_ended_too(tmp_path):
    # PyDLL keeps the lock: no thread of Python's can run.
    done = run(tmp_path, "ctypes.PyDLL(None).sleep(1000)")
    assert done.returncode != 0
    assert "in stuck" in done.stderr


def test_a_process_that_goes_on_is_left_alone(tmp_path):
    done = run(tmp_path, "[(time.sleep(0.2), watched.beat(n)) for n in range(10)]")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_by_a_run_that_ends(tmp_path):
    with watchdog.Watchdog(5.0, str(tmp_path), 0) as watched:
        watched.beat(1)
    assert not watched._thread.is_alive()
    assert watchdog.first_lines(str(tmp_path)) == []


def test_ranks_are_told_in_their_order(tmp_path):
    for rank in (10, 2):
        (tmp_path / f"rank_{rank}.txt").write_text(f"rank {rank} waits\nmore\n")
    assert watchdog.first_lines(str(tmp_path)) == ["rank 2 waits", "rank 10 waits"]
    assert watchdog.first_lines(str(tmp_path / "nothing")) == []


def test_the_innermost_frame_of_ours_is_named(tmp_path):
    said = watchdog.Watchdog(5.0, str(tmp_path), 0).stacks().splitlines()[0]
    assert ", in stacks (watchdog.py:" in said
