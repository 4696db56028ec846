"""A window of steps in the middle of a run, timed by the engine itself. What the times mean is not its matter."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.wire.messages import StepTrace

# Ranks hand their times over with a ping, which comes every second
_TIMES_SECONDS = 3.0


def open_window(llm: DistLLM, workload: Workload, count: int) -> Future[StepTrace]:
    """Ask for `count` steps about the middle of a run of `workload` that begins now.

    A request takes at least a step per token of its answer, so half of the longest answer is never past the end.
    """
    return llm.trace_steps(count, max(0, max(workload.output_lens) - count) // 2)


def close_window(llm: DistLLM, window: Future[StepTrace]) -> StepTrace:
    """The times of a window whose run is over; without steps if it never began. Raises EngineDeadError."""
    try:
        return window.result(_TIMES_SECONDS)
    except FutureTimeoutError:
        llm.trace_steps(0).result(_TIMES_SECONDS)
        return window.result(_TIMES_SECONDS)
