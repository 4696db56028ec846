"""A traced window whose phases are known: two steps in flight, a step every 4 ms, the device idle for 1 ms of it."""

from __future__ import annotations

from nanovllm_dist.wire.messages import RankTimes, StepTimes, StepTrace

MS = 1e-3


def step_times(step: int, start: float = 1000.0) -> StepTimes:
    """Step `step`, planned `4 * step` ms after `start`."""
    began = start + 4 * MS * step
    after = (0.1, 5.0, 5.2, 5.3, 5.7)
    return StepTimes(step, 8, 8 + step, began, *(began + MS * one for one in after))


def rank_times(step: int, start: float = 1000.0) -> RankTimes:
    """Step `step` on a rank: it has its work 1.5 ms after the plan and is done after 4.5 ms."""
    began = start + 4 * MS * step
    return RankTimes(step, began + 0.5 * MS, began + 1.5 * MS, began + 4.5 * MS)


def traced_window(steps: int, ranks: int = 1, ahead: float = 0.0) -> StepTrace:
    """Consecutive steps; the clocks of the ranks are `ahead` seconds of the coordinator's."""
    times = [rank_times(step, 1000.0 + ahead) for step in range(steps)]
    return StepTrace([step_times(step) for step in range(steps)], [times] * ranks)
