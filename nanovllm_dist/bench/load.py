"""Load: requests that arrive at random, at one rate after another, against one engine; times on the client's clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from nanovllm_dist.async_client import AsyncDistLLM
from nanovllm_dist.bench.chrome_trace import write_chrome_trace
from nanovllm_dist.bench.distribution import Distribution
from nanovllm_dist.bench.engine_run import EngineCounters, counted, sampling_params
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.bench.load_run import Timeline, drive, poisson_gaps
from nanovllm_dist.bench.session import EngineSummary, Session, WorkloadSummary, open_session, workload_summary
from nanovllm_dist.bench.step_breakdown import DEFAULT_STEPS, StepBreakdown, breakdown
from nanovllm_dist.bench.step_window import close_window
from nanovllm_dist.bench.workloads import RANDOM, Workload, make_workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, NanoVLLMError
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.wire.messages import StepTrace

_WARM_UP_REQUESTS, _WARM_UP_TOKENS = 64, 32


@dataclass(frozen=True)
class LoadSettings:
    """How to measure: requests arrive as a Poisson process of each of `rates` a second, for `seconds`.

    Lengths are uniform within `range_ratio` around the two given ones. `trace_steps` in the middle of each rate are
    timed phase by phase, and all of these written to `trace_file` if there is one.

    Raises ConfigError: no rate, or none that is positive, or no time.
    """

    rates: tuple[float, ...] = (16.0,)
    seconds: float = 45.0
    input_len: int = 768
    output_len: int = 128
    range_ratio: float = 0.33
    temperature: float = 0.6
    trace_steps: int = DEFAULT_STEPS
    trace_file: str | None = None

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise ConfigError(f"--rate {' '.join(f'{rate:g}' for rate in self.rates)} is not positive")
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"--seconds {self.seconds:g} is not positive")

    def workloads(self) -> list[Workload]:
        """The work of each rate. Raises ConfigError: a length is out of range."""
        return [
            make_workload(
                RANDOM,
                num_requests=max(1, round(rate * self.seconds)),
                input_len=self.input_len,
                output_len=self.output_len,
                range_ratio=self.range_ratio,
            )
            for rate in self.rates
        ]


class RateResult(msgspec.Struct, frozen=True):
    """One rate: seconds from sending a request to its first token (TTFT) and to its last (E2E), between any two
    tokens of a request (ITL), and per request the mean of those gaps (TPOT).

    `seconds`: from the first request sent to the last token. `lateness`: how long after they were due requests left.
    `client_cpu`: cores that the client kept busy; near 1 it is the bottleneck. `steps` are some of the middle.
    """

    rate: float
    workload: WorkloadSummary
    refused: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lateness: Distribution | None
    client_cpu: float
    counters: EngineCounters
    steps: StepBreakdown | None = None


class LoadReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="load"):
    """Everything that was measured, a result per rate."""

    environment: Environment
    engine: EngineSummary
    results: list[RateResult]


def measure_load(config: EngineConfig, settings: LoadSettings, notify: Callable[[str], None]) -> LoadReport:
    """Start an engine, measure, stop it. `notify` hears of every rate. Raises NanoVLLMError."""
    session = open_session(config, *settings.workloads())
    environment = describe_environment()
    with DistLLM.from_engine(Engine.start(config, progress=True)) as llm:
        return load_of(llm, session, environment, settings, notify)


def load_of(
    llm: DistLLM, session: Session, environment: Environment, settings: LoadSettings, notify: Callable[[str], None]
) -> LoadReport:
    """Measure an engine that runs; `session` is of its config. Raises NanoVLLMError."""
    measured = asyncio.run(_all_rates(llm, settings, notify))
    write_chrome_trace([trace for _result, trace in measured], settings.trace_file)
    results = [msgspec.structs.replace(result, steps=breakdown(trace)) for result, trace in measured]
    return LoadReport(environment, session.engine_summary(llm.info), results)


async def _all_rates(
    llm: DistLLM, settings: LoadSettings, notify: Callable[[str], None]
) -> list[tuple[RateResult, StepTrace]]:
    client, works = AsyncDistLLM(llm), settings.workloads()
    await _warm_up(client, works[0], settings.temperature)
    measured = []
    for index, (rate, work) in enumerate(zip(settings.rates, works, strict=True)):
        notify(f"{work.num_requests} requests at {rate:g} a second")
        window = asyncio.create_task(_window_in_the_middle(llm, settings))
        result = await _one_rate(client, rate, work, f"load {index}", settings.temperature)
        measured.append((result, await asyncio.to_thread(close_window, llm, await window)))
    return measured


async def _window_in_the_middle(llm: DistLLM, settings: LoadSettings) -> Future[StepTrace]:
    await asyncio.sleep(settings.seconds / 2)
    return llm.trace_steps(settings.trace_steps)


async def _warm_up(client: AsyncDistLLM, work: Workload, temperature: float) -> None:
    few = work.shortened(_WARM_UP_TOKENS, _WARM_UP_REQUESTS)
    params = sampling_params(few, temperature)
    await drive(client, few.prompts("load warm-up", client.info.vocab_size), params, [0.0] * few.num_requests)


async def _one_rate(
    client: AsyncDistLLM, rate: float, work: Workload, repetition: str, temperature: float
) -> RateResult:
    prompts = work.prompts(repetition, client.info.vocab_size)
    gaps = poisson_gaps(rate, work.num_requests, f"{repetition}:{rate}")
    params = sampling_params(work, temperature)
    before = await client.stats()
    began, busy = time.perf_counter(), time.process_time()
    timelines = await drive(client, prompts, params, gaps)
    client_cpu = (time.process_time() - busy) / (time.perf_counter() - began)
    counters = counted(before, await client.stats())
    _check_lengths(timelines, work)
    return summarise(rate, workload_summary(work, temperature), timelines, client_cpu, counters)


def summarise(
    rate: float, work: WorkloadSummary, timelines: list[Timeline], client_cpu: float, counters: EngineCounters
) -> RateResult:
    """The figures of one rate. Raises NanoVLLMError when every request was refused."""
    done = [one for one in timelines if not one.refused]
    if not done:
        raise NanoVLLMError(f"the engine refused all {len(timelines)} requests at {rate:g} a second")
    seconds = max(one.tokens[-1] for one in done) - min(one.sent for one in timelines)
    spans = [(one.tokens[-1] - one.tokens[0], len(one.tokens) - 1) for one in done]
    return RateResult(
        rate=rate,
        workload=work,
        refused=len(timelines) - len(done),
        seconds=seconds,
        requests_per_second=len(done) / seconds,
        output_tokens_per_second=sum(len(one.tokens) for one in done) / seconds,
        ttft=Distribution.of(one.tokens[0] - one.sent for one in done),
        itl=Distribution.of(later - earlier for one in done for earlier, later in pairwise(one.tokens)),
        tpot=Distribution.of(span / gaps for span, gaps in spans if gaps),
        e2e=Distribution.of(one.tokens[-1] - one.sent for one in done),
        lateness=Distribution.of(one.sent - one.due for one in timelines),
        client_cpu=client_cpu,
        counters=counters,
    )


def _check_lengths(timelines: list[Timeline], work: Workload) -> None:
    for index, (one, wanted) in enumerate(zip(timelines, work.output_lens, strict=True)):
        if not one.refused and len(one.tokens) != wanted:
            raise NanoVLLMError(f"request {index} gave {len(one.tokens)} tokens instead of {wanted}")
