"""Traced windows as a Chrome trace, which Perfetto and chrome://tracing open: a process each for the coordinator and
every rank, a rank with a track for its host and one for its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nanovllm_dist.bench.step_breakdown import device_began, on_one_clock
from nanovllm_dist.wire.messages import RankTimes, StepTimes, StepTrace

_HOST, _DEVICE = 0, 1
_Event = dict[str, Any]


def write_chrome_trace(traces: Sequence[StepTrace], path: str | Path | None) -> None:
    """Write the windows to `path`, one after another on one axis of time. Nothing happens without a path."""
    if path is not None:
        Path(path).write_bytes(msgspec.json.encode({"traceEvents": trace_events(traces), "displayTimeUnit": "ms"}))


def trace_events(traces: Sequence[StepTrace]) -> list[_Event]:
    """Names of processes and tracks, then complete events (`ph` X) in microseconds from the first step's plan."""
    zero = min((one.planned for trace in traces for one in trace.steps), default=0.0)
    ranks = max((len(trace.ranks) for trace in traces), default=0)
    events = [*_names(0, "coordinator", {_HOST: "host"})]
    for rank in range(ranks):
        events += _names(rank + 1, f"rank {rank}", {_HOST: "host", _DEVICE: "device"})
    for trace in map(on_one_clock, traces):
        for step in trace.steps:
            events += _coordinator_events(step, zero)
        sizes = {one.step: _size(one) for one in trace.steps}
        for rank, times in enumerate(trace.ranks):
            for before, one in zip([None, *times], times, strict=False):
                events += _rank_events(rank + 1, one, before, sizes[one.step], zero)
    return events


def _names(pid: int, process: str, tracks: dict[int, str]) -> Iterator[_Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for tid, name in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _coordinator_events(step: StepTimes, zero: float) -> Iterator[_Event]:
    size = _size(step)
    yield _span(0, _HOST, "schedule", step.planned, step.sent, zero, size)
    yield _span(0, _HOST, "commit", step.answered, step.committed, zero, size)
    yield _span(0, _HOST, "deliver", step.delivering, step.delivered, zero, size)


def _rank_events(
    pid: int, times: RankTimes, before: RankTimes | None, size: dict[str, int], zero: float
) -> Iterator[_Event]:
    yield _span(pid, _HOST, "prepare", times.received, times.launched, zero, size)
    yield _span(pid, _DEVICE, "step", device_began(times, before), times.done, zero, size)


def _size(step: StepTimes) -> dict[str, int]:
    return {"step": step.step, "rows": step.rows, "tokens": step.tokens}


def _span(pid: int, tid: int, name: str, start: float, end: float, zero: float, args: dict[str, int]) -> _Event:
    ts, dur = round(1e6 * (start - zero), 3), round(1e6 * (end - start), 3)
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}
