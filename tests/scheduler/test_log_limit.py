"""Whoever sends nonsense without end does not fill the log."""

from __future__ import annotations

from nanovllm_dist.scheduler.log_limit import LogLimit


def test_the_first_lines_are_written_and_then_one_in_a_while_that_counts_the_others() -> None:
    limit = LogLimit(burst=3, seconds=10.0)
    written = [(second, left_out) for second in range(25) if (left_out := limit.take(float(second))) is not None]
    assert written == [(0, 0), (1, 0), (2, 0), (12, 9), (22, 9)]


def test_after_a_quiet_time_the_first_lines_are_written_again() -> None:
    limit = LogLimit(burst=2, seconds=10.0)
    for _ in range(5):
        limit.take(0.0)
    assert [limit.take(100.0), limit.take(100.0), limit.take(100.0)] == [3, 0, None]
