"""Side by side: this engine and its rivals on the same work in one run, in turns, with start-up times and memory.

All are started one after another and stay; one works while the others are idle. It draws no tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from nanovllm_dist.bench.contestant import Answer, Contestant, Rivals, entries
from nanovllm_dist.bench.distribution import median
from nanovllm_dist.bench.environment import Environment, describe_environment
from nanovllm_dist.bench.memory_watch import MemoryWatch
from nanovllm_dist.bench.session import WorkloadSummary, open_session, workload_summary
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig

_WARM_UP_TOKENS = 8
# Threads of whoever worked last may wait awake for a while; without a rest they take it from the next
_REST_SECONDS = 2.0


@dataclass(frozen=True)
class SideBySideSettings:
    """How to measure: every workload `runs` times after a warm-up, beside `rivals`."""

    rivals: Rivals
    runs: int = 3
    temperature: float = 0.6


class Work(msgspec.Struct, frozen=True):
    """One contestant on one workload, a value per run: wall seconds, output tokens per second of them, the median
    over requests of seconds to the first token, and of tokens per second after it (None where it cannot tell)."""

    seconds: list[float]
    output_tokens_per_second: list[float]
    first_token: list[float | None]
    decode_tokens_per_second: list[float | None]


class ContestantReport(msgspec.Struct, frozen=True):
    """One contestant. Seconds from its command until it took work and until its first token; the largest sum of
    resident bytes over its processes, start and work included; `work` by the workload's name."""

    name: str
    version: str
    ready: float
    first_token: float
    peak_memory: int
    work: dict[str, Work]


class SideBySideReport(msgspec.Struct, frozen=True, tag_field="benchmark", tag="side-by-side"):
    """Everything that was measured; we are the first of `contestants`."""

    environment: Environment
    model: str
    dtype: str
    tensor_parallel_size: int
    runs: int
    workloads: list[WorkloadSummary]
    contestants: list[ContestantReport]


def measure_side_by_side(
    config: EngineConfig, workloads: Sequence[Workload], settings: SideBySideSettings, notify: Callable[[str], None]
) -> SideBySideReport:
    """Start all, measure, stop all. `notify` hears of every start and run. Raises NanoVLLMError."""
    session = open_session(config, *workloads)
    longest = max(workload.longest for workload in workloads) + _WARM_UP_TOKENS
    entered = entries(session.resolved, settings.rivals, longest)
    environment = describe_environment()
    with ExitStack() as stack:
        watch = stack.enter_context(MemoryWatch())
        contestants = []
        for entry in entered:
            contestants.append(Contestant(entry, watch))
            stack.callback(contestants[-1].stop)
            notify(f"{entry.name}: ready after {contestants[-1].ready:.2f} s")
        answers = _take_turns(contestants, workloads, settings, session.model.vocab_size, notify)
        reports = [
            ContestantReport(
                name=one.name,
                version=one.version,
                ready=one.ready,
                first_token=one.first_token,
                peak_memory=watch.peak(one.name),
                work={workload.name: work_of(workload, answers[one.name, workload.name]) for workload in workloads},
            )
            for one in contestants
        ]
    return SideBySideReport(
        environment=environment,
        model=session.resolved.served_model_name,
        dtype=session.resolved.dtype,
        tensor_parallel_size=session.resolved.tensor_parallel_size,
        runs=settings.runs,
        workloads=[workload_summary(workload, settings.temperature) for workload in workloads],
        contestants=reports,
    )


def work_of(workload: Workload, answers: Sequence[Answer]) -> Work:
    """The figures of one contestant's runs."""
    return Work(
        seconds=[answer.seconds for answer in answers],
        output_tokens_per_second=[workload.output_tokens / answer.seconds for answer in answers],
        first_token=[median(answer.first_token) if answer.first_token else None for answer in answers],
        decode_tokens_per_second=[1.0 / median(answer.per_token) if answer.per_token else None for answer in answers],
    )


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """Our median over theirs; None where one of the two has no figures."""
    known = [[value for value in values if value is not None] for values in (ours, theirs)]
    return median(known[0]) / median(known[1]) if all(known) else None


def _take_turns(
    contestants: Sequence[Contestant],
    workloads: Sequence[Workload],
    settings: SideBySideSettings,
    vocab_size: int,
    notify: Callable[[str], None],
) -> dict[tuple[str, str], list[Answer]]:
    answers: dict[tuple[str, str], list[Answer]] = {}
    for workload in workloads:
        short = workload.shortened(_WARM_UP_TOKENS)
        for one in contestants:
            one.run(short, short.prompts("warm-up", vocab_size), settings.temperature)
        for number in range(1, settings.runs + 1):
            prompts = workload.prompts(f"run {number}", vocab_size)
            line = []
            for one in contestants:
                time.sleep(_REST_SECONDS)
                answer = one.run(workload, prompts, settings.temperature)
                answers.setdefault((one.name, workload.name), []).append(answer)
                line.append(f"{one.name} {workload.output_tokens / answer.seconds:,.1f}")
            notify(f"{workload.name}, run {number} of {settings.runs}, output tokens/s: {', '.join(line)}")
    return answers
