"""Start-up: fresh processes each time, from the first instruction of a user's program to the first token."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from nanovllm_dist.bench.distribution import median
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.bench.json_process import JsonProcess
from nanovllm_dist.bench.session import open_session
from nanovllm_dist.config import EngineConfig


class StartupReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="startup"):
    """Seconds since a new Python process was started, a value per run, and their medians.

    `phases`: when each phase of the start began, the median over runs; `stop`: seconds that stopping took.
    """

    environment: Environment
    model: str
    launcher: str
    dtype: str
    device: str
    ready: list[float]
    first_token: list[float]
    stop: list[float]
    median_ready: float
    median_first_token: float
    phases: dict[str, float]


def measure_startup(config: EngineConfig, runs: int, notify: Callable[[str], None]) -> StartupReport:
    """Start `runs` engines, one after another. `notify` hears of every run. Raises NanoVLLMError.

    The model is fetched before, if need be; its files may be in the system's cache already.
    """
    session = open_session(config)
    environment = describe_environment()
    timelines = []
    for number in range(1, runs + 1):
        timelines.append(_start_once(config))
        times = timelines[-1]
        notify(f"run {number} of {runs}: ready after {times['ready']:.2f} s, first token {times['first_token']:.2f} s")
    ready = [times["ready"] for times in timelines]
    first_token = [times["first_token"] for times in timelines]
    return StartupReport(
        environment=environment,
        model=session.resolved.served_model_name,
        launcher=session.resolved.launcher,
        dtype=session.resolved.dtype,
        device=session.resolved.device,
        ready=ready,
        first_token=first_token,
        stop=[times["stopped"] - times["first_token"] for times in timelines],
        median_ready=median(ready),
        median_first_token=median(first_token),
        phases=_median_phases(timelines),
    )


def _start_once(config: EngineConfig) -> dict[str, float]:
    """When each event was first heard of, in seconds since the process was started."""
    times: dict[str, float] = {}
    started = time.perf_counter()
    with JsonProcess("the engine's program", "nanovllm_dist.bench.startup_probe") as process:
        process.send(msgspec.to_builtins(config))
        while "stopped" not in times:
            event = str(process.receive()["event"])
            times.setdefault(event, time.perf_counter() - started)
    return times


def _median_phases(timelines: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in timelines[0] if name not in ("ready", "first_token", "stopped")]
    return {name: median([times[name] for times in timelines if name in times]) for name in names}
