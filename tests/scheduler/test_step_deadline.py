"""A step that does not end is noticed after the limit, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from nanovllm_dist.scheduler.step_deadline import StepDeadline


def seconds_until_passed(deadline: StepDeadline, steps: list[int | None], every: float = 0.2) -> float | None:
    """Look every `every` seconds, with the oldest step of that look in flight."""
    for index, step in enumerate(steps):
        if deadline.passed(index * every, step):
            return index * every
    return None


def test_a_step_that_stays_the_oldest_in_flight_passes_the_limit() -> None:
    assert seconds_until_passed(StepDeadline(3.0), [7] * 100) == pytest.approx(3.0, abs=0.21)


def test_steps_that_end_before_the_limit_never_pass_it() -> None:
    assert seconds_until_passed(StepDeadline(3.0), [look // 10 for look in range(1000)]) is None


def test_an_idle_engine_waits_for_nothing() -> None:
    assert seconds_until_passed(StepDeadline(3.0), [None] * 1000) is None


def test_a_step_after_a_long_idle_time_has_the_whole_limit() -> None:
    assert seconds_until_passed(StepDeadline(3.0), [None] * 100 + [0] * 14) is None


def test_without_a_limit_a_step_may_take_for_ever() -> None:
    assert seconds_until_passed(StepDeadline(0.0), [7] * 10_000) is None


def test_time_in_which_the_coordinator_itself_stood_still_is_not_held_against_the_ranks() -> None:
    deadline = StepDeadline(3.0)
    assert not deadline.passed(0.0, 7)
    assert not deadline.passed(1000.0, 7)
