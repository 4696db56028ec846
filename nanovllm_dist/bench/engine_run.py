"""One run of a workload on an engine: its times, and what the engine counted meanwhile.

Throughput runs ask for whole answers only, so that the client costs nothing; gaps between tokens are taken in a
run of their own, where every token is streamed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from itertools import pairwise

import msgspec

from nanovllm_dist.async_client import AsyncDistLLM
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.client import DistLLM
from nanovllm_dist.errors import NanoVLLMError
from nanovllm_dist.outputs import RequestOutput
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import EngineStats


class EngineRun(msgspec.Struct, frozen=True):
    """One `generate` call: wall seconds, and seconds per request on the engine's clock, from its arrival."""

    seconds: float
    output_tokens: int
    ttft: list[float]
    tpot: list[float]
    e2e: list[float]
    cached_tokens: int


class HostTime(msgspec.Struct, frozen=True):
    """A time of the coordinator's: mean µs per step over `steps` steps."""

    steps: int
    mean_us: float


class EngineCounters(msgspec.Struct, frozen=True):
    """What the engine did between two looks at its statistics.

    By running requests, rounded up to a power of two: `host_us_per_step`, its processor time, and
    `answer_us_per_step`, wall time from a step's result to the next step's departure. `batch_histogram`: rows -> steps.
    """

    steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    host_us_per_step: dict[int, HostTime]
    answer_us_per_step: dict[int, HostTime]
    batch_histogram: dict[int, int]


def run_workload(llm: DistLLM, workload: Workload, repetition: str, temperature: float) -> EngineRun:
    """Send every request at once and wait for all answers.

    Raises NanoVLLMError: an answer is not as long as the workload says; else as `DistLLM.generate`.
    """
    prompts = workload.prompts(repetition, llm.info.vocab_size)
    params = sampling_params(workload, temperature)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    _check_lengths([len(output.token_ids) for output in outputs], workload)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    return EngineRun(
        seconds=seconds,
        output_tokens=workload.output_tokens,
        ttft=[one.first_token for one in metrics],
        tpot=[one.per_token for one in metrics if one.per_token >= 0],
        e2e=[one.total for one in metrics],
        cached_tokens=sum(one.num_cached_tokens for one in metrics),
    )


def token_gaps(llm: DistLLM, workload: Workload, repetition: str, temperature: float) -> list[float]:
    """Stream every request at once: seconds between one token of a request and its next, on the client's clock."""
    prompts = workload.prompts(repetition, llm.info.vocab_size)
    arrivals = asyncio.run(_stream_all(llm, prompts, sampling_params(workload, temperature)))
    _check_lengths([len(times) for times in arrivals], workload)
    return [later - earlier for times in arrivals for earlier, later in pairwise(times)]


def sampling_params(workload: Workload, temperature: float) -> list[SamplingParams]:
    """Exactly as many tokens as the workload says, and no text."""
    return [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in workload.output_lens
    ]


def counted(before: EngineStats, after: EngineStats) -> EngineCounters:
    """The difference of two looks at the statistics of one engine."""
    rows = {count: steps - before.batch_histogram.get(count, 0) for count, steps in after.batch_histogram.items()}
    return EngineCounters(
        steps=after.steps - before.steps,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        generated_tokens=after.generated_tokens - before.generated_tokens,
        prefix_queries=after.prefix_queries - before.prefix_queries,
        prefix_hits=after.prefix_hits - before.prefix_hits,
        preemptions=after.preemptions - before.preemptions,
        host_us_per_step=_new_times(before.host_us_per_step, after.host_us_per_step),
        answer_us_per_step=_new_times(before.answer_us_per_step, after.answer_us_per_step),
        batch_histogram={count: steps for count, steps in sorted(rows.items()) if steps},
    )


def _new_times(before: Mapping[int, tuple[int, float]], after: Mapping[int, tuple[int, float]]) -> dict[int, HostTime]:
    """The means of the steps that came between, by bucket."""
    times = {}
    for bucket, (steps, mean) in sorted(after.items()):
        steps_before, mean_before = before.get(bucket, (0, 0.0))
        if steps > steps_before:
            new = steps - steps_before
            times[bucket] = HostTime(new, (steps * mean - steps_before * mean_before) / new)
    return times


def token_arrivals(output: RequestOutput, now: float) -> list[float]:
    """The arrival time of each token that a streamed update brings; the last update brings none."""
    return [now] * len(output.token_ids)


async def _stream_all(llm: DistLLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[float]]:
    client = AsyncDistLLM(llm)
    window = asyncio.Semaphore(max(1, llm.info.max_queued // 2))

    async def arrivals(prompt: list[int], one: SamplingParams) -> list[float]:
        async with window:
            times: list[float] = []
            async for output in client.stream(prompt, one):
                times += token_arrivals(output, time.perf_counter())
            return times

    return await asyncio.gather(*map(arrivals, prompts, params))


def _check_lengths(lengths: list[int], workload: Workload) -> None:
    for index, (got, wanted) in enumerate(zip(lengths, workload.output_lens, strict=True)):
        if got != wanted:
            raise NanoVLLMError(f"request {index} of {workload.name} gave {got} tokens instead of {wanted}")
