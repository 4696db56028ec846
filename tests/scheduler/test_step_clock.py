"""What a step costs is booked under the number of running requests, rounded up to a power of two."""

from __future__ import annotations

import pytest

from nanovllm_dist.scheduler.step_clock import StepClock


def test_processor_time_is_counted_from_step_to_step() -> None:
    clock = StepClock()
    clock.idle(now=10.0)
    clock.step_left(now=10.001, running=3, rows=3)
    clock.step_left(now=10.004, running=4, rows=4)

    assert clock.host_us_per_step() == {4: (2, pytest.approx(2000.0))}
    assert clock.batch_histogram == {3: 1, 4: 1}


def test_what_is_done_while_there_are_no_requests_serves_no_step() -> None:
    clock = StepClock()
    clock.idle(now=100.0)
    clock.step_left(now=100.5, running=1, rows=1)

    assert clock.host_us_per_step() == {1: (1, pytest.approx(500_000.0))}


def test_an_answer_is_booked_under_the_step_that_it_sent() -> None:
    clock = StepClock()
    clock.step_left(now=0.0, running=64, rows=64)
    clock.answered(0.0002)
    clock.answered(0.0004)

    assert clock.answer_us_per_step() == {64: (2, pytest.approx(300.0))}
