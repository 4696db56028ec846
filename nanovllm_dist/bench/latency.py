"""Latency: the requests of a workload one after another, each streamed, on the client's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from nanovllm_dist.bench.distribution import Distribution, median
from nanovllm_dist.bench.engine_run import EngineCounters, counted, sampling_params, token_arrivals
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.bench.roofline import Hardware, Limit
from nanovllm_dist.bench.session import EngineSummary, WorkloadSummary, open_session, workload_summary
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine


@dataclass(frozen=True)
class LatencySettings:
    """How to measure: the whole workload `runs` times after a warm-up."""

    runs: int = 5
    temperature: float = 0.6
    hardware: Hardware | None = None


class LatencyReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="latency"):
    """Seconds from sending a request to its first token (TTFT), between tokens (ITL), and to the end (E2E).

    `decode_tokens_per_second`: tokens after the first over the time they took, the median over requests; None where
    no request has more than one.
    """

    environment: Environment
    engine: EngineSummary
    workload: WorkloadSummary
    runs: int
    ttft: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    decode_tokens_per_second: float | None
    counters: EngineCounters
    limit: Limit | None
    share_of_limit: float | None


def measure_latency(
    config: EngineConfig, workload: Workload, settings: LatencySettings, notify: Callable[[str], None]
) -> LatencyReport:
    """Start an engine, measure, stop it. `notify` hears of every run. Raises NanoVLLMError."""
    session = open_session(config, workload)
    environment = describe_environment()
    timelines: list[list[float]] = []
    with DistLLM.from_engine(Engine.start(config, progress=True)) as llm:
        _run(llm, workload, "warm-up", settings.temperature)
        before = llm.stats()
        for number in range(1, settings.runs + 1):
            timelines += _run(llm, workload, f"run {number}", settings.temperature)
            notify(f"run {number} of {settings.runs}: first token after {timelines[-1][1] - timelines[-1][0]:.3f} s")
        counters = counted(before, llm.stats())
        engine = session.engine_summary(llm.info)
    rates = [(len(times) - 2) / (times[-1] - times[1]) for times in timelines if len(times) > 2]
    decode = median(rates) if rates else None
    bound = session.limit(workload, settings.hardware, max_num_seqs=1) if settings.hardware is not None else None
    return LatencyReport(
        environment=environment,
        engine=engine,
        workload=workload_summary(workload, settings.temperature),
        runs=settings.runs,
        ttft=Distribution.of(times[1] - times[0] for times in timelines),
        itl=Distribution.of(later - earlier for times in timelines for earlier, later in pairwise(times[1:])),
        e2e=Distribution.of(times[-1] - times[0] for times in timelines),
        decode_tokens_per_second=decode,
        counters=counters,
        limit=bound,
        share_of_limit=decode / bound.one_request_tokens_per_second if bound and decode else None,
    )


def _run(llm: DistLLM, workload: Workload, repetition: str, temperature: float) -> list[list[float]]:
    """For each request: when it was sent, then when each of its tokens arrived."""
    timelines = []
    prompts = workload.prompts(repetition, llm.info.vocab_size)
    for prompt, params in zip(prompts, sampling_params(workload, temperature), strict=True):
        times = [time.perf_counter()]
        for output in llm.stream(prompt, params):
            times += token_arrivals(output, time.perf_counter())
        timelines.append(times)
    return timelines
