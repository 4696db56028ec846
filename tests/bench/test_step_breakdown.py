"""The phases of a traced step are those it went through, and add up."""

from __future__ import annotations

import msgspec
import pytest
from traced_steps import MS, rank_times, step_times, traced_window

from nanovllm_dist.bench.step_breakdown import StepBreakdown, breakdown, on_one_clock
from nanovllm_dist.wire.messages import RankTimes, StepTrace

PHASES = ("schedule", "send", "prepare", "queued", "device", "back", "commit", "next_step", "deliver")


def means(steps: StepBreakdown | None) -> dict[str, float]:
    assert steps is not None
    return {name: getattr(steps, name).mean for name in (*PHASES, "span", "interval", "device_idle")}


def test_every_phase_is_told_and_they_add_up_to_the_span_of_a_step() -> None:
    found = means(breakdown(traced_window(11)))
    assert found == pytest.approx(
        {
            "schedule": 100.0,
            "send": 400.0,
            "prepare": 1000.0,
            "queued": 0.0,
            "device": 3000.0,
            "back": 500.0,
            "commit": 200.0,
            "next_step": 100.0,
            "deliver": 400.0,
            "span": 5700.0,
            "interval": 4000.0,
            "device_idle": 1000.0,
        },
        abs=0.01,
    )
    assert sum(found[name] for name in PHASES) == pytest.approx(found["span"])
    assert found["device"] + found["device_idle"] == pytest.approx(found["interval"])


def test_a_device_that_is_busy_when_its_work_comes_is_not_booked_twice() -> None:
    first, second = rank_times(0), rank_times(1)
    early = msgspec.structs.replace(second, launched=first.done - 2 * MS, received=first.done - 2.5 * MS)
    found = means(breakdown(StepTrace([step_times(0), step_times(1)], [[first, early]])))
    assert found["queued"] == pytest.approx(2000.0, abs=0.01)
    assert found["device"] == found["interval"] == pytest.approx(4000.0, abs=0.01)
    assert found["device_idle"] == 0.0


def test_the_first_step_only_tells_when_the_device_was_free() -> None:
    steps = breakdown(traced_window(3))
    assert steps is not None
    assert steps.span.count == 2
    assert (steps.rows, steps.tokens) == (8.0, 9.5)
    assert breakdown(traced_window(1)) is None
    assert breakdown(StepTrace([], [])) is None


def test_steps_whose_times_a_rank_has_not_told_are_left_out() -> None:
    trace = traced_window(6)
    told = StepTrace(trace.steps, [[one for one in trace.ranks[0] if one.step != 2]])
    steps = breakdown(told)
    assert steps is not None
    assert steps.interval.count == 3  # 1, 4 and 5: the one after the gap has no step before it
    assert steps.interval.mean == pytest.approx(4000.0, abs=0.01)
    assert breakdown(StepTrace(trace.steps, [[]])) is None


@pytest.mark.parametrize("ahead", [-7200.0, -0.01, 0.01, 86_400.0])
def test_a_rank_on_another_clock_is_set_so_that_there_and_back_take_as_long(ahead: float) -> None:
    found = means(breakdown(traced_window(11, ahead=ahead)))
    assert (found["send"], found["back"]) == pytest.approx((450.0, 450.0), abs=0.5)
    assert (found["prepare"], found["device"]) == pytest.approx((1000.0, 3000.0), abs=0.5)


def test_the_clock_of_this_host_is_left_alone_also_where_another_rank_is_a_little_late() -> None:
    late = [RankTimes(one.step, one.received, one.launched, one.done + 1.5 * MS) for one in traced_window(5).ranks[0]]
    trace = StepTrace(traced_window(5).steps, [traced_window(5).ranks[0], late])
    assert on_one_clock(trace) == trace
