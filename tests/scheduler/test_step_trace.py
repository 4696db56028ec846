"""A trace holds the times of as many steps as were asked for, of all ranks, and no others."""

from __future__ import annotations

import pytest

from nanovllm_dist.scheduler.plan import StepPlan
from nanovllm_dist.scheduler.step_trace import StepTrace
from nanovllm_dist.wire.messages import RankTimes


def leave(trace: StepTrace, step: int) -> bool:
    """Step `step` leaves at the time of its number; whether it is traced."""
    if not trace.takes_next():
        return False
    trace.sent(StepPlan(step), planned=float(step), sent=step + 0.1)
    return True


def come_back(trace: StepTrace, step: int) -> None:
    """It is back 0.5 later."""
    trace.committed(step, answered=step + 0.5, committed=step + 0.6)
    trace.delivered(step + 0.7, step + 0.8)


def on_rank(step: int) -> RankTimes:
    return RankTimes(step, step + 0.2, step + 0.3, step + 0.4)


def test_the_steps_asked_for_are_traced_after_those_to_be_skipped() -> None:
    trace = StepTrace(b"client", count=2, skip=3, ranks=1)
    assert [leave(trace, step) for step in range(7)] == [False, False, False, True, True, False, False]


def test_a_trace_is_complete_when_every_rank_has_told_its_times() -> None:
    trace = StepTrace(b"client", count=2, skip=0, ranks=2)
    for step in (5, 6):
        leave(trace, step)
    trace.on_rank(1, [on_rank(5)])  # a rank may tell before the answer is back
    come_back(trace, 5)
    assert not trace.must_ask_ranks()
    come_back(trace, 6)
    assert [trace.must_ask_ranks(), trace.must_ask_ranks()] == [True, False]
    trace.on_rank(0, [on_rank(5), on_rank(6)])
    assert not trace.complete
    trace.on_rank(1, [on_rank(6)])
    assert trace.complete

    message = trace.to_message()

    assert [one.step for one in message.steps] == [5, 6]
    first = message.steps[0]
    assert (first.planned, first.sent, first.answered) == (5.0, 5.1, 5.5)
    assert (first.committed, first.delivering, first.delivered) == (5.6, 5.7, 5.8)
    assert message.ranks == [[on_rank(5), on_rank(6)]] * 2


def test_steps_that_left_before_or_after_are_no_part_of_it() -> None:
    trace = StepTrace(b"client", count=1, skip=0, ranks=1)
    leave(trace, 5)
    come_back(trace, 4)
    come_back(trace, 5)
    come_back(trace, 6)
    trace.on_rank(0, [on_rank(4), on_rank(5), on_rank(6)])
    message = trace.to_message()
    assert [one.step for one in message.steps] == [5]
    assert message.ranks == [[on_rank(5)]]


def test_when_requests_run_out_a_trace_that_has_begun_ends_and_one_that_has_not_waits() -> None:
    begun, waiting = (StepTrace(b"client", count=100, skip=0, ranks=1) for _ in range(2))
    leave(begun, 0)
    for trace in (begun, waiting):
        trace.idle()
    assert not leave(begun, 1)
    assert leave(waiting, 1)
    assert not begun.complete
    come_back(begun, 0)
    begun.on_rank(0, [on_rank(0)])
    assert begun.complete


@pytest.mark.parametrize("skip", [0, 5])
def test_a_trace_of_no_steps_is_complete_at_once(skip: int) -> None:
    trace = StepTrace(b"client", count=0, skip=skip, ranks=4)
    assert trace.complete
    assert trace.to_message().steps == []
