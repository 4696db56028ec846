"""A request gives the same tokens alone, in a crowd, chunked, from the prefix cache and after preemption.

fp32, the real model, real processes; greedy and sampled with a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompts import PROMPTS

from nanovllm_dist import LLM, SamplingParams

TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=1234, max_tokens=TOKENS, ignore_eos=True)
BOTH = [(prompt, params) for prompt in PROMPTS[:4] for params in (GREEDY, SAMPLED)]


@contextmanager
def engine(model: Path, **options: object) -> Iterator[LLM]:
    """A local engine in fp32."""
    with LLM(str(model), dtype="float32", launcher="local", progress=False, **options) as llm:
        yield llm


def run(llm: LLM) -> list[list[int]]:
    """The eight requests, together."""
    outputs = llm.generate([prompt for prompt, _ in BOTH], [params for _, params in BOTH], use_tqdm=False)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(smollm2: Path) -> list[list[int]]:
    """Each request with nothing beside it, nothing cached and the prompt in one piece."""
    with engine(smollm2, enable_prefix_caching=False) as llm:
        return [llm.generate([prompt], params, use_tqdm=False)[0].token_ids for prompt, params in BOTH]


@pytest.mark.slow
def test_in_a_random_mix_of_64_others_and_again_from_the_prefix_cache(smollm2: Path, alone: list[list[int]]) -> None:
    rng = random.Random(0)
    others = [
        ([rng.randrange(1000, 40_000) for _ in range(rng.randint(1, 60))], SamplingParams(
            temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(1, 30), seed=rng.randrange(99), ignore_eos=True
        ))
        for _ in range(64)
    ]  # fmt: skip
    mixed: list[tuple[object, SamplingParams, int]] = [(p, s, -1) for p, s in others]
    mixed += [(prompt, params, index) for index, (prompt, params) in enumerate(BOTH)]
    rng.shuffle(mixed)
    with engine(smollm2, max_num_seqs=48, block_size=4) as llm:
        outputs = llm.generate([m[0] for m in mixed], [m[1] for m in mixed], use_tqdm=False)  # type: ignore[misc]
        crowded = {m[2]: output.token_ids for m, output in zip(mixed, outputs, strict=True) if m[2] >= 0}
        assert [crowded[index] for index in range(len(BOTH))] == alone

        hits = llm.stats().prefix_hits
        assert run(llm) == alone
        assert llm.stats().prefix_hits > hits


@pytest.mark.slow
def test_chunked_at_seven_tokens_and_two_steps_in_flight(smollm2: Path, alone: list[list[int]]) -> None:
    with engine(smollm2, prefill_chunk_size=7, max_steps_in_flight=2, block_size=16) as llm:
        assert run(llm) == alone


@pytest.mark.slow
def test_preempted_by_a_cache_that_holds_three_of_them_at_two_ranks(smollm2: Path, alone: list[list[int]]) -> None:
    with engine(smollm2, num_blocks=9, block_size=16, max_model_len=256, tensor_parallel_size=2) as llm:
        assert run(llm) == alone
        assert llm.stats().preemptions > 0
