"""Where the time of a step goes: the phases of a traced window, each step's from its plan to its outputs.

Steps overlap, so phases add up to the span of a step, not to the time between steps: that is what the device is busy
and idle. Sampling is part of the device's work, often of the same graph, and is not told apart.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, median

import msgspec

from nanovllm_dist.bench.distribution import Distribution
from nanovllm_dist.wire.messages import RankTimes, StepTimes, StepTrace

DEFAULT_STEPS = 256


class StepBreakdown(msgspec.Struct, frozen=True):
    """Microseconds per step, of `span.count` consecutive steps of `rows` rows and `tokens` tokens on average.

    Phases, in order, which add up to `span`: `schedule` (planned and handed to the sockets), `send` (until rank 0 has
    the frame), `prepare` (until the device has its work), `queued` (the device is busy with the step before),
    `device` (until the tokens are on the host, sampling included), `back` (until the coordinator has them), `commit`,
    `next_step` (the steps that this allowed leave first), `deliver` (outputs handed to the clients' sockets).
    `interval`: between the ends of two steps on the device, which is `device` and `device_idle`.
    """

    rows: float
    tokens: float
    schedule: Distribution
    send: Distribution
    prepare: Distribution
    queued: Distribution
    device: Distribution
    back: Distribution
    commit: Distribution
    next_step: Distribution
    deliver: Distribution
    span: Distribution
    interval: Distribution
    device_idle: Distribution


def breakdown(trace: StepTrace) -> StepBreakdown | None:
    """The phases of a window; None when it has fewer than two steps. The first only tells when the device was free."""
    trace = on_one_clock(trace)
    of_rank_0 = {one.step: one for one in trace.ranks[0]} if trace.ranks else {}
    both = [(one, of_rank_0[one.step]) for one in trace.steps if one.step in of_rank_0]
    pairs = [(one, before, rank) for (_, before), (one, rank) in pairwise(both) if before.step + 1 == rank.step]
    phases = [_phases(one, before, rank) for one, before, rank in pairs]
    if not phases:
        return None
    means = {name: _distribution([1e6 * one[name] for one in phases]) for name in phases[0]}
    rows, tokens = (fmean(counts) for counts in zip(*((one.rows, one.tokens) for one, *_ in pairs), strict=True))
    return StepBreakdown(rows=rows, tokens=tokens, **means)


def _phases(step: StepTimes, before: RankTimes, rank: RankTimes) -> dict[str, float]:
    began = device_began(rank, before)
    return {
        "schedule": step.sent - step.planned,
        "send": rank.received - step.sent,
        "prepare": rank.launched - rank.received,
        "queued": began - rank.launched,
        "device": rank.done - began,
        "back": step.answered - rank.done,
        "commit": step.committed - step.answered,
        "next_step": step.delivering - step.committed,
        "deliver": step.delivered - step.delivering,
        "span": step.delivered - step.planned,
        "interval": rank.done - before.done,
        "device_idle": began - before.done,
    }


def device_began(times: RankTimes, before: RankTimes | None) -> float:
    """When the device turned to a step: it has its work, and the step before is done."""
    return times.launched if before is None else max(times.launched, before.done)


def on_one_clock(trace: StepTrace) -> StepTrace:
    """The trace with the times of ranks whose clock is another host's set to the coordinator's.

    A clock that shows a frame received before it was sent, or an answer done after it was had, is another one. It is
    set so that the way there takes as long as the way back: the differences between ranks are then an estimate.
    """
    steps = {one.step: one for one in trace.steps}
    return StepTrace(trace.steps, [_set_clock(times, steps) for times in trace.ranks])


def _set_clock(times: list[RankTimes], steps: dict[int, StepTimes]) -> list[RankTimes]:
    if not times:
        return times
    there = median(one.received - steps[one.step].sent for one in times)
    back = median(steps[one.step].answered - one.done for one in times)
    # a rank other than 0 may end after rank 0 has answered: it is late then, and not on another clock
    if there >= 0 and back >= -median(one.done - one.received for one in times):
        return times
    ahead = (there - back) / 2
    return [RankTimes(one.step, one.received - ahead, one.launched - ahead, one.done - ahead) for one in times]


def _distribution(values: list[float]) -> Distribution:
    summary = Distribution.of(values)
    assert summary is not None
    return summary
