"""Many requests, two clients, a cache far too small, some aborted: each ends exactly once and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from nanovllm_dist import LLM, AsyncDistLLM, SamplingParams

REQUESTS = 512
VOCAB = 512  # of the tiny model


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 2])
def test_512_requests_through_two_clients_end_exactly_once(tiny_model: Path, in_flight: int) -> None:
    rng = random.Random(in_flight)
    work = [(rng.randint(1, 100), rng.randint(1, 100), rng.random() < 0.1) for _ in range(REQUESTS)]
    tokens = sum(prompt + output for prompt, output, _ in work)
    with LLM(
        str(tiny_model),
        load_format="dummy",
        dtype="float32",
        launcher="local",
        progress=False,
        block_size=16,
        num_blocks=tokens // 10 // 16,
        max_num_seqs=64,
        max_steps_in_flight=in_flight,
    ) as llm:
        ends, late = asyncio.run(_both_clients(llm.address, work, rng))
        stats = llm.stats()
    assert Counter(ends) == Counter(length=ends.count("length"), abort=ends.count("abort"))
    assert len(ends) == REQUESTS
    assert ends.count("abort") > 0.02 * REQUESTS
    assert late == 0
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
    assert sum(stats.finished.values()) == REQUESTS


async def _both_clients(
    address: str, work: list[tuple[int, int, bool]], rng: random.Random
) -> tuple[list[str | None], int]:
    late = 0

    async def one(client: AsyncDistLLM, prompt_len: int, output_len: int, aborted: bool, delay: float) -> str | None:
        nonlocal late
        params = SamplingParams(temperature=0.8, max_tokens=output_len, ignore_eos=True, detokenize=False)
        prompt = [rng.randrange(3, VOCAB) for _ in range(prompt_len)]
        generation = client.stream(prompt, params)
        reason: str | None = None
        count = 0
        if aborted:
            await asyncio.sleep(delay)
            generation.abort()
        async for output in generation:
            if reason is not None:
                late += 1
            count += len(output.token_ids)
            reason = output.finish_reason
        assert count == output_len if reason == "length" else count <= output_len
        return reason

    async with await AsyncDistLLM.connect(address) as first, await AsyncDistLLM.connect(address) as second:
        jobs = [
            one((first, second)[index % 2], prompt, output, aborted, rng.random())
            for index, (prompt, output, aborted) in enumerate(work)
        ]
        return list(await asyncio.gather(*jobs)), late
