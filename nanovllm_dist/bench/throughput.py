"""Throughput: a whole workload at once, several times, beside Hugging Face `generate` if asked.

The rivals take turns, and one is idle while the other runs. It draws no tables.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from nanovllm_dist.bench.chrome_trace import write_chrome_trace
from nanovllm_dist.bench.distribution import Distribution, median
from nanovllm_dist.bench.engine_run import EngineCounters, EngineRun, counted, run_workload, token_gaps
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.bench.roofline import Achieved, Hardware, Limit, achieved
from nanovllm_dist.bench.session import EngineSummary, Session, WorkloadSummary, open_session, workload_summary
from nanovllm_dist.bench.step_breakdown import DEFAULT_STEPS, StepBreakdown, breakdown
from nanovllm_dist.bench.step_window import close_window, open_window
from nanovllm_dist.bench.transformers_baseline import BATCH_SIZE, TransformersBaseline, waiting_policy
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.wire.messages import StepTrace

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class ThroughputSettings:
    """How to measure. `gaps`: one more run, streamed, for the time between tokens.

    `trace_steps` of the last run are timed phase by phase, and written to `trace_file` if there is one.
    """

    runs: int = 3
    temperature: float = 0.6
    gaps: bool = True
    compare: bool = False
    hardware: Hardware | None = None
    trace_steps: int = DEFAULT_STEPS
    trace_file: str | None = None


class Rates(msgspec.Struct, frozen=True):
    """Tokens per second of wall time, and the seconds themselves, a value per run; medians beside them."""

    seconds: list[float]
    output_tokens_per_second: list[float]
    median_output_tokens_per_second: float
    median_total_tokens_per_second: float


class Comparison(msgspec.Struct, frozen=True):
    """The rival's rates; `ratio` is our median over its median, `ratios` those of each pair of neighbours.

    `waiting`: the OpenMP waiting policy it ran with.
    """

    rival: str
    waiting: str
    batch_size: int
    rates: Rates
    ratio: float
    ratios: list[float]


class ThroughputReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="throughput"):
    """Everything that was measured. Times are seconds, over the requests of all runs.

    TTFT, TPOT and E2E are the engine's, from a request's arrival; ITL is the client's, of a streamed run. `steps` are
    some of the last run.
    """

    environment: Environment
    engine: EngineSummary
    workload: WorkloadSummary
    rates: Rates
    ttft: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    itl: Distribution | None
    counters: EngineCounters
    comparison: Comparison | None
    limit: Limit | None
    achieved: Achieved | None
    steps: StepBreakdown | None = None


def measure_throughput(
    config: EngineConfig, workload: Workload, settings: ThroughputSettings, notify: Callable[[str], None]
) -> ThroughputReport:
    """Start an engine, measure, stop it. `notify` hears of every run. Raises NanoVLLMError."""
    session = open_session(config, workload)
    environment = describe_environment()
    with ExitStack() as stack:
        llm = stack.enter_context(DistLLM.from_engine(Engine.start(config, progress=True)))
        rival = stack.enter_context(TransformersBaseline(session.resolved)) if settings.compare else None
        return throughput_of(llm, session, environment, workload, settings, notify, rival)


def throughput_of(
    llm: DistLLM,
    session: Session,
    environment: Environment,
    workload: Workload,
    settings: ThroughputSettings,
    notify: Callable[[str], None],
    rival: TransformersBaseline | None = None,
) -> ThroughputReport:
    """Measure an engine that runs; `session` is of its config. Raises NanoVLLMError."""
    _warm_up(llm, rival, workload, settings.temperature)
    before = llm.stats()
    ours, theirs, trace = _take_turns(llm, rival, workload, settings, notify)
    counters = counted(before, llm.stats())
    gaps: list[float] = []
    if settings.gaps:
        notify("streaming every token, for the time between them")
        gaps = token_gaps(llm, workload, "streamed", settings.temperature)
    write_chrome_trace([trace], settings.trace_file)
    engine = session.engine_summary(llm.info)
    report = _report(session, environment, engine, workload, settings, ours, theirs, counters, gaps)
    return msgspec.structs.replace(report, steps=breakdown(trace))


def _warm_up(llm: DistLLM, rival: TransformersBaseline | None, workload: Workload, temperature: float) -> None:
    run_workload(llm, workload.shortened(_WARM_UP_TOKENS), "warm-up", temperature)
    if rival is not None:
        batch = workload.shortened(_WARM_UP_TOKENS, BATCH_SIZE)
        rival.run(batch, batch.prompts("warm-up", llm.info.vocab_size), temperature)


def _take_turns(
    llm: DistLLM,
    rival: TransformersBaseline | None,
    workload: Workload,
    settings: ThroughputSettings,
    notify: Callable[[str], None],
) -> tuple[list[EngineRun], list[float], StepTrace]:
    ours: list[EngineRun] = []
    theirs: list[float] = []
    for number in range(1, settings.runs + 1):
        repetition = f"run {number}"
        if number == settings.runs:
            window = open_window(llm, workload, settings.trace_steps)
        ours.append(run_workload(llm, workload, repetition, settings.temperature))
        line = f"{repetition} of {settings.runs}: {workload.output_tokens / ours[-1].seconds:,.1f} output tokens/s"
        if rival is not None:
            prompts = workload.prompts(repetition, llm.info.vocab_size)
            theirs.append(rival.run(workload, prompts, settings.temperature))
            line += f", transformers {workload.output_tokens / theirs[-1]:,.1f}"
        notify(line)
    return ours, theirs, close_window(llm, window)


def _report(
    session: Session,
    environment: Environment,
    engine: EngineSummary,
    workload: Workload,
    settings: ThroughputSettings,
    ours: list[EngineRun],
    theirs: list[float],
    counters: EngineCounters,
    gaps: list[float],
) -> ThroughputReport:
    rates = _rates([run.seconds for run in ours], workload)
    bound = reached = None
    if settings.hardware is not None:
        bound = session.limit(workload, settings.hardware, engine.max_num_seqs)
        reached = achieved(bound, settings.hardware, median(rates.seconds))
    return ThroughputReport(
        environment=environment,
        engine=engine,
        workload=workload_summary(workload, settings.temperature),
        rates=rates,
        ttft=Distribution.of(value for run in ours for value in run.ttft),
        tpot=Distribution.of(value for run in ours for value in run.tpot),
        e2e=Distribution.of(value for run in ours for value in run.e2e),
        itl=Distribution.of(gaps),
        counters=counters,
        comparison=_comparison(rates, _rates(theirs, workload)) if theirs else None,
        limit=bound,
        achieved=reached,
    )


def _rates(seconds: list[float], workload: Workload) -> Rates:
    output = [workload.output_tokens / value for value in seconds]
    total = (workload.prompt_tokens + workload.output_tokens) / workload.output_tokens
    return Rates(seconds, output, median(output), median(output) * total)


def _comparison(ours: Rates, theirs: Rates) -> Comparison:
    pairs = zip(ours.output_tokens_per_second, theirs.output_tokens_per_second, strict=True)
    ratio = ours.median_output_tokens_per_second / theirs.median_output_tokens_per_second
    return Comparison(
        "transformers", waiting_policy(), BATCH_SIZE, theirs, ratio, [our / their for our, their in pairs]
    )
