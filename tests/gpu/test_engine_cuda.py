"""The whole engine on a GPU, with every fast path on: in fp32 a request's tokens are transformers' tokens, and they
do not depend on company, chunks, prefix hits, graphs, preemption or the number of ranks.

Real processes and small random checkpoints. One engine per model serves most of the checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import pytest
import torch
from checkpoints import CONFIGS, VOCAB, Checkpoint, make_checkpoint, random_tokens

from nanovllm_dist import LLM, RequestOutput, SamplingParams

Request = tuple[list[int], SamplingParams]

DEVICE = "cuda"
TOKENS = 24
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 200, 255, 257, 333, 448, 511, 513, 600)


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **fields)  # type: ignore[arg-type]


def sampled(seed: int, **fields: object) -> SamplingParams:
    params = {"temperature": 0.9, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False} | fields
    return SamplingParams(seed=seed, **params)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Workload:
    """Every prompt twice, for its likeliest tokens and for drawn ones; and the tokens that transformers gives."""

    checkpoint: Checkpoint
    requests: list[Request]
    tokens: list[list[int]]


def make_workload(checkpoint: Checkpoint) -> Workload:
    """Prompts and seeds are the first at which no token was a near tie: so there is one right answer."""
    requests: list[Request] = []
    texts = []
    for length in LENGTHS:
        for seed in count(length, step=1000):
            prompt = random_tokens(length, seed)
            text, clear = checkpoint.text(prompt, greedy())
            if clear:
                break
        for seed in count(length, step=1000):
            drawn, clear = checkpoint.text(prompt, sampled(seed))
            if clear:
                break
        requests += [(prompt, greedy()), (prompt, sampled(seed))]
        texts += [text, drawn]
    return Workload(checkpoint, requests, texts)


def start(checkpoint: Checkpoint, **options: object) -> LLM:
    """An engine in fp32 whose steps mix decodes with prefills: half of the requests wait for the others."""
    defaults = {"dtype": "float32", "launcher": "local", "max_num_seqs": 20, "max_num_batched_tokens": 1024}
    if "num_blocks" not in options:
        defaults["kv_cache_memory"] = 2**30  # another engine may be beside it on the GPU
    return LLM(str(checkpoint.directory), device=DEVICE, progress=False, **(defaults | options))  # type: ignore[arg-type]


def worker_log(llm: LLM) -> str:
    assert llm.engine is not None
    return (llm.engine._deployment.directory / "worker-0.log").read_text()


def generate(llm: LLM, requests: Sequence[Request], salt: str = "") -> list[RequestOutput]:
    """The requests, together; nothing of another salt is found in the prefix cache."""
    prompts, params = [prompt for prompt, _ in requests], [params for _, params in requests]
    return llm.generate(prompts, params, use_tqdm=False, cache_salt=salt)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    assert all(output.finish_reason == "length" for output in outputs)
    return [output.token_ids for output in outputs]


def check(llm: LLM, workload: Workload, salt: str = "") -> None:
    """All requests together give the tokens of transformers."""
    found = tokens_of(generate(llm, workload.requests, salt))
    wrong = [
        f"prompt of {len(prompt)}, temperature {params.temperature}, seed {params.seed}: {tokens}, not {right}"
        for (prompt, params), tokens, right in zip(workload.requests, found, workload.tokens, strict=True)
        if tokens != right
    ]
    assert wrong == []


@pytest.fixture(scope="module", params=list(CONFIGS))
def workload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """Of Llama, Qwen2 and Qwen3."""
    return make_workload(make_checkpoint(CONFIGS[request.param], tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def llm(workload: Workload) -> Iterator[LLM]:
    """One rank with the options that a user gets."""
    with start(workload.checkpoint) as llm:
        yield llm


# --- the tokens of transformers, whatever happens to a request -----------------------------------------------


def test_the_prompts_and_the_seeds_matter(workload: Workload) -> None:
    assert len({tuple(tokens) for tokens in workload.tokens}) == len(workload.requests)


def test_together(llm: LLM, workload: Workload) -> None:
    check(llm, workload, "together")


def test_together_from_the_prefix_cache(llm: LLM, workload: Workload) -> None:
    check(llm, workload, "twice")
    before = llm.stats().prefix_hits
    check(llm, workload, "twice")
    assert llm.stats().prefix_hits > before


def test_alone(llm: LLM, workload: Workload) -> None:
    for index, request in enumerate(workload.requests):
        [alone] = tokens_of(generate(llm, [request], f"alone {index}"))
        assert alone == workload.tokens[index], f"request {index}, prompt of {len(request[0])}"


def test_without_graphs_and_steps_in_flight(workload: Workload) -> None:
    with start(workload.checkpoint, enforce_eager=True, max_steps_in_flight=1) as llm:
        check(llm, workload)


def test_in_chunks_and_after_preemption(workload: Workload) -> None:
    with start(workload.checkpoint, prefill_chunk_size=64, block_size=16, num_blocks=45) as llm:
        check(llm, workload)
        assert llm.stats().preemptions > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_on_several_ranks(workload: Workload, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    with start(workload.checkpoint, tensor_parallel_size=ranks) as llm:
        check(llm, workload)
        check(llm, workload)  # from the prefix cache
        assert "norms are not joined" not in worker_log(llm)


# --- rows that want more than a plain draw -----------------------------------------------------------------

# At a low temperature few tokens have a share worth mentioning, and near ties are rare
SPECIAL = {
    "top_k": sampled(1, top_k=5),
    "top_k of one": sampled(2, top_k=1),
    "top_p": sampled(3, top_p=0.8, temperature=0.6),
    "top_k and top_p": sampled(4, top_k=20, top_p=0.9, temperature=1.3),
    "min_p": sampled(5, min_p=0.1),
    "logprobs": greedy(logprobs=5),
    "drawn with logprobs": sampled(6, logprobs=0, temperature=0.3),
    "prompt_logprobs": greedy(prompt_logprobs=3),
    "repetition_penalty": greedy(repetition_penalty=1.5),
    "other penalties": sampled(7, presence_penalty=0.5, frequency_penalty=0.7, temperature=0.3),
    "logit_bias": greedy(logit_bias={5: 100.0}),
    "allowed_token_ids": sampled(8, allowed_token_ids=[3, 14, 159]),
    "min_tokens": greedy(min_tokens=3),
}
PROMPT = random_tokens(70, seed=70)


@dataclass(frozen=True)
class Company:
    """What came out when plain and special rows ran side by side; `plain` is PROMPT's likeliest text."""

    plain: list[int]
    tokens: list[list[int]]
    special: dict[str, tuple[SamplingParams, RequestOutput]]


@pytest.fixture(scope="module")
def company(llm: LLM, workload: Workload) -> Company:
    """The workload and SPECIAL in turn, with words banned that would come: one alone, and the second of two."""
    [plain] = tokens_of(generate(llm, [(PROMPT, greedy())]))
    special = SPECIAL | {"bad_words": greedy(bad_words=[f"w{plain[0]}", f"w{plain[3]} w{plain[4]}"])}
    mixed = [
        request
        for pair in zip(workload.requests, [(PROMPT, params) for params in special.values()], strict=False)
        for request in pair
    ]
    outputs = generate(llm, mixed + workload.requests[len(special) :], "company")
    end = len(mixed)
    answers = zip(special.values(), outputs[1:end:2], strict=True)
    return Company(plain, tokens_of(outputs[:end:2] + outputs[end:]), dict(zip(special, answers, strict=True)))


def test_plain_rows_do_not_notice_special_ones(workload: Workload, company: Company) -> None:
    assert company.tokens == workload.tokens


def test_special_rows_do_not_notice_their_company(llm: LLM, company: Company) -> None:
    for name, (params, output) in company.special.items():
        [alone] = tokens_of(generate(llm, [(PROMPT, params)], f"alone, {name}"))
        assert output.token_ids == alone, name


def test_special_rows_get_what_they_ask_for(company: Company) -> None:
    plain, tokens = company.plain, {name: output.token_ids for name, (_, output) in company.special.items()}
    assert all(len(ids) == TOKENS and 0 <= min(ids) <= max(ids) < VOCAB for ids in tokens.values())
    assert tokens["top_k of one"] == tokens["logprobs"] == tokens["prompt_logprobs"] == tokens["min_tokens"] == plain
    assert set(tokens["allowed_token_ids"]) <= {3, 14, 159}
    assert tokens["logit_bias"] == [5] * TOKENS
    banned = tokens["bad_words"]
    assert plain[0] not in banned
    assert (plain[3], plain[4]) not in pairwise(banned)


def test_log_probabilities_are_those_of_transformers(workload: Workload, company: Company) -> None:
    for name in ("logprobs", "drawn with logprobs"):
        params, output = company.special[name]
        assert output.logprobs is not None
        theirs = workload.checkpoint.logprobs(PROMPT + output.token_ids)[len(PROMPT) - 1 : -1]
        for token, entries, row in zip(output.token_ids, output.logprobs, theirs, strict=True):
            assert set(entries) == {token, *row.topk(params.logprobs or 0).indices.tolist()}
            assert all(entry.logprob == pytest.approx(row[id_].item(), abs=1e-3) for id_, entry in entries.items())
    prompt_logprobs = company.special["prompt_logprobs"][1].prompt_logprobs
    assert prompt_logprobs is not None
    theirs = workload.checkpoint.logprobs(PROMPT)
    for token, entries, row in zip(PROMPT[1:], prompt_logprobs[1:], theirs[:-1], strict=True):
        assert entries is not None
        assert entries[token].logprob == pytest.approx(row[token].item(), abs=1e-3)
