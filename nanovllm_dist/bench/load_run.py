"""A Poisson stream of requests against one engine, timed where a client sees it.

Requests leave when they are due, whether earlier ones have been answered or not. How late they left is kept too:
arrivals of a Poisson process see the event loop as it is on average, so their lateness is what the client itself adds
to every time it takes. It knows nothing of reports.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from nanovllm_dist.async_client import AsyncDistLLM
from nanovllm_dist.bench.engine_run import token_arrivals
from nanovllm_dist.errors import QueueFullError
from nanovllm_dist.sampling_params import SamplingParams


@dataclass
class Timeline:
    """One request, in seconds on this process' clock: when it was to leave, when it left, when each token came.

    `refused`: the engine's queue was full.
    """

    due: float
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    refused: bool = False


def poisson_gaps(rate: float, count: int, seed: str) -> list[float]:
    """Seconds before each of `count` arrivals: a Poisson process, given that they take `count / rate` seconds in all.

    Exponential gaps scaled to that sum, so that the load offered is the load asked for; the same for the same seed.
    """
    rng = Random(seed)
    gaps = [rng.expovariate(rate) for _ in range(count)]
    scale = count / rate / sum(gaps)
    return [gap * scale for gap in gaps]


async def drive(
    client: AsyncDistLLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams], gaps: Sequence[float]
) -> list[Timeline]:
    """Send request i `gaps[i]` seconds after request i - 1 was due, and wait for all answers.

    Raises NanoVLLMError as soon as a request fails for another reason than a full queue.
    """
    tasks: list[asyncio.Task[Timeline]] = []
    failed = asyncio.Event()

    def watch(task: asyncio.Task[Timeline]) -> None:
        if not task.cancelled() and task.exception() is not None:
            failed.set()

    with _settled_collector():
        due = time.perf_counter()
        try:
            for prompt, one, gap in zip(prompts, params, gaps, strict=True):
                due += gap
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if failed.is_set():
                    break
                tasks.append(asyncio.create_task(_request(client, prompt, one, Timeline(due))))
                tasks[-1].add_done_callback(watch)
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()


async def _request(client: AsyncDistLLM, prompt: list[int], params: SamplingParams, timeline: Timeline) -> Timeline:
    timeline.sent = time.perf_counter()
    try:
        async for output in client.stream(prompt, params):
            timeline.tokens += token_arrivals(output, time.perf_counter())
    except QueueFullError:
        timeline.refused = True
    return timeline


@contextmanager
def _settled_collector() -> Iterator[None]:
    """Have the garbage collector leave alone what is there already: millions of prompt tokens, looked at in vain."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
