"""The progress line: speed, time left, terminal or not."""

from __future__ import annotations

import io

from xlc_ray.progress import Progress, duration, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(stream: io.StringIO, start: tuple[int, int], updates: list[tuple[float, int, int]]) -> list[str]:
    now = [0.0]
    with Progress("generate", "chunks", 25, *start, stream=stream, clock=lambda: now[0]) as progress:
        for seconds, done, tokens in updates:
            now[0] = seconds
            progress.update(done, tokens)
    return stream.getvalue().splitlines()


def test_line_says_what_is_done_how_fast_and_what_is_left():
    assert lines_of(io.StringIO(), (0, 0), [(6.0, 6, 98304), (12.0, 12, 196608)]) == [
        "generate  6/25 chunks   98,304 tokens   16,384 tok/s",
        "generate  12/25 chunks   196,608 tokens   16,384 tok/s   0:13 left",
    ]


def test_start_up_does_not_spoil_the_estimate():
    assert lines_of(io.StringIO(), (0, 0), [(100.0, 1, 10), (101.0, 2, 20), (106.0, 7, 70)])[-1].endswith("0:18 left")


def test_what_a_resumed_run_found_does_not_count_as_speed():
    assert "1,000 tok/s" in lines_of(io.StringIO(), (10, 100_000), [(10.0, 20, 110_000)])[0]


def test_plain_output_is_sparse_and_ends_with_the_last_state():
    lines = lines_of(io.StringIO(), (0, 0), [(i / 10, i // 5, i * 10) for i in range(1, 126)])
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "left" not in lines[-1]


def test_terminal_redraws_one_line_in_place():
    stream = Terminal()
    lines_of(stream, (0, 0), [(1.0, 1, 10), (2.0, 2, 20)])
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().count("\n") == 1


def test_durations_and_sizes_read_well():
    assert [duration(s) for s in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
    assert [size(n) for n in (999, 1500, 2_150_000, 3_000_000_000)] == ["999 B", "1.5 kB", "2.1 MB", "3.0 GB"]
