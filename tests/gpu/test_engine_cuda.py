"""The whole engine on a GPU, with every fast path on: in fp32 a request's tokens are transformers' tokens, and they
do not depend on company, chunks, prefix hits, graphs, preemption or the number of ranks.

Real processes and small random checkpoints. One engine per model serves most of the checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from checkpoints import CONFIGS, VOCAB, Checkpoint, make_checkpoint, random_tokens

from nanovllm_dist import LLM, RequestOutput, SamplingParams

Request = tuple[list[int], SamplingParams]

DEVICE = "cuda"
TOKENS = 24
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257, 333, 448, 511, 513, 600)
# What rounding of fp32 can do to logits of about 3 is a thousand times less
NEAR_TIE = 1e-4


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **fields)  # type: ignore[arg-type]


def sampled(seed: int, **fields: object) -> SamplingParams:
    params = {"temperature": 0.9, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False} | fields
    return SamplingParams(seed=seed, **params)  # type: ignore[arg-type]


# Every prompt twice: likeliest tokens, and drawn ones
REQUESTS: list[Request] = [
    (random_tokens(length, seed=length), params) for length in LENGTHS for params in (greedy(), sampled(length))
]
GREEDY = range(0, len(REQUESTS), 2)


def start(checkpoint: Checkpoint, **options: object) -> LLM:
    """An engine in fp32 whose steps mix decodes with prefills: half of the requests wait for the others."""
    defaults = {"dtype": "float32", "launcher": "local", "max_num_seqs": 20, "max_num_batched_tokens": 1024}
    return LLM(str(checkpoint.directory), device=DEVICE, progress=False, **(defaults | options))  # type: ignore[arg-type]


def generate(llm: LLM, requests: Sequence[Request], salt: str = "") -> list[RequestOutput]:
    """The requests, together; nothing of another salt is found in the prefix cache."""
    prompts, params = [prompt for prompt, _ in requests], [params for _, params in requests]
    return llm.generate(prompts, params, use_tqdm=False, cache_salt=salt)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    assert all(output.finish_reason == "length" for output in outputs)
    return [output.token_ids for output in outputs]


def run(llm: LLM, salt: str = "") -> list[list[int]]:
    return tokens_of(generate(llm, REQUESTS, salt))


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Llama, Qwen2 and Qwen3."""
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Iterator[LLM]:
    """One rank with the options that a user gets."""
    with start(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """The tokens of REQUESTS, run together on one rank, by graphs, with nothing cached before."""
    return run(llm)


# --- one rank ----------------------------------------------------------------------------------------------


def test_greedy_tokens_equal_transformers(checkpoint: Checkpoint, expected: list[list[int]]) -> None:
    leads = []
    for index in GREEDY:
        prompt, tokens = REQUESTS[index][0], expected[index]
        choices, lead = checkpoint.choices(prompt + tokens)
        # each choice follows from our tokens before it, so by induction its own search finds the same ones
        assert tokens == choices[len(prompt) - 1 : -1].tolist(), f"prompt of {len(prompt)} tokens"
        leads.append(lead[len(prompt) - 1 : -1])
    assert torch.cat(leads).min() > NEAR_TIE  # so there was one right answer everywhere


def test_the_prompts_and_the_seeds_matter(expected: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in expected}) == len(REQUESTS)


def test_alone_the_tokens_are_the_same(llm: LLM, expected: list[list[int]]) -> None:
    for index, request in enumerate(REQUESTS):
        [alone] = tokens_of(generate(llm, [request], salt=f"alone {index}"))
        assert alone == expected[index], f"request {index}, prompt of {len(request[0])} tokens"


def test_from_the_prefix_cache_the_tokens_are_the_same(llm: LLM, expected: list[list[int]]) -> None:
    assert run(llm, "twice") == expected
    before = llm.stats().prefix_hits
    assert run(llm, "twice") == expected
    assert llm.stats().prefix_hits > before


def test_without_graphs_the_tokens_are_the_same(checkpoint: Checkpoint, expected: list[list[int]]) -> None:
    with start(checkpoint, enforce_eager=True, max_steps_in_flight=1) as llm:
        assert run(llm) == expected


def test_in_chunks_and_after_preemption_the_tokens_are_the_same(
    checkpoint: Checkpoint, expected: list[list[int]]
) -> None:
    with start(checkpoint, prefill_chunk_size=64, block_size=16, num_blocks=45) as llm:
        assert run(llm) == expected
        assert llm.stats().preemptions > 0


# --- rows that want more than a plain draw -----------------------------------------------------------------

SPECIAL = {
    "top_k": sampled(1, top_k=5),
    "top_k of one": sampled(2, top_k=1),
    "top_p": sampled(3, top_p=0.8),
    "top_k and top_p": sampled(4, top_k=50, top_p=0.9, temperature=1.3),
    "min_p": sampled(5, min_p=0.1),
    "logprobs": greedy(logprobs=5),
    "drawn with logprobs": sampled(6, logprobs=0),
    "prompt_logprobs": greedy(prompt_logprobs=3),
    "repetition_penalty": greedy(repetition_penalty=1.5),
    "other penalties": sampled(7, presence_penalty=0.5, frequency_penalty=0.7),
    "logit_bias": greedy(logit_bias={5: 100.0}),
    "allowed_token_ids": sampled(8, allowed_token_ids=[3, 14, 159]),
    "bad_words": greedy(),  # they depend on what comes without them: see the fixture
}
PROMPT_OF_SPECIAL = random_tokens(70, seed=70)


@pytest.fixture(scope="module")
def special(llm: LLM) -> dict[str, SamplingParams]:
    """SPECIAL, with words banned that would be generated: a single one, and the second of two."""
    [plain] = tokens_of(generate(llm, [(PROMPT_OF_SPECIAL, greedy())]))
    return SPECIAL | {"bad_words": greedy(bad_words=[f"w{plain[0]}", f"w{plain[3]} w{plain[4]}"])}


@pytest.fixture(scope="module")
def in_company(llm: LLM, special: dict[str, SamplingParams]) -> tuple[list[list[int]], dict[str, RequestOutput]]:
    """REQUESTS and the special ones, one by one in turn: (tokens of the former, outputs of the latter)."""
    others = [(PROMPT_OF_SPECIAL, params) for params in special.values()]
    head = [request for pair in zip(REQUESTS, others, strict=False) for request in pair]
    outputs = generate(llm, head + REQUESTS[len(others) :], salt="company")
    count = 2 * len(others)
    return tokens_of(outputs[:count:2] + outputs[count:]), dict(zip(special, outputs[1:count:2], strict=True))


def test_plain_rows_do_not_notice_special_ones(
    expected: list[list[int]], in_company: tuple[list[list[int]], dict[str, RequestOutput]]
) -> None:
    assert in_company[0] == expected


def test_special_rows_do_not_notice_their_company(
    llm: LLM, special: dict[str, SamplingParams], in_company: tuple[list[list[int]], dict[str, RequestOutput]]
) -> None:
    for name, params in special.items():
        [alone] = tokens_of(generate(llm, [(PROMPT_OF_SPECIAL, params)], salt=f"alone, {name}"))
        assert in_company[1][name].token_ids == alone, name


def test_special_rows_get_what_they_ask_for(
    llm: LLM, in_company: tuple[list[list[int]], dict[str, RequestOutput]]
) -> None:
    [plain] = tokens_of(generate(llm, [(PROMPT_OF_SPECIAL, greedy())]))
    tokens = {name: output.token_ids for name, output in in_company[1].items()}
    assert tokens["top_k of one"] == tokens["logprobs"] == tokens["prompt_logprobs"] == plain
    assert set(tokens["allowed_token_ids"]) <= {3, 14, 159}
    assert tokens["logit_bias"] == [5] * TOKENS
    assert plain[0] not in tokens["bad_words"]
    assert (plain[3], plain[4]) not in zip(tokens["bad_words"], tokens["bad_words"][1:], strict=False)
    assert len(set(tokens["repetition_penalty"])) == TOKENS
    assert all(len(ids) == TOKENS and 0 <= min(ids) <= max(ids) < VOCAB for ids in tokens.values())


def test_log_probabilities_are_those_of_transformers(
    checkpoint: Checkpoint, in_company: tuple[list[list[int]], dict[str, RequestOutput]]
) -> None:
    for name in ("logprobs", "drawn with logprobs"):
        output = in_company[1][name]
        with torch.inference_mode():
            logits = checkpoint.reference(torch.tensor([PROMPT_OF_SPECIAL + output.token_ids])).logits[0]
        theirs = torch.log_softmax(logits[len(PROMPT_OF_SPECIAL) - 1 : -1], -1)
        assert output.logprobs is not None
        for position, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            assert token in entries
            for candidate, entry in entries.items():
                assert math.isclose(entry.logprob, theirs[position, candidate].item(), abs_tol=1e-3)
    assert all(entries[token].rank == 1 for token, entries in zip(*greedy_logprobs(in_company[1]), strict=True))


def greedy_logprobs(outputs: dict[str, RequestOutput]) -> tuple[list[int], list[dict[int, object]]]:
    output = outputs["logprobs"]
    return output.token_ids, output.logprobs  # type: ignore[return-value]


# --- several ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_on_several_ranks_the_tokens_are_the_same(
    checkpoint: Checkpoint, expected: list[list[int]], ranks: int
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    with start(checkpoint, tensor_parallel_size=ranks) as llm:
        assert run(llm) == expected
        assert run(llm) == expected  # from the prefix cache
