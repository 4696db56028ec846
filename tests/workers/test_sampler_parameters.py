"""Each sampling parameter means what it says: the sampler against a slow reference on random logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import edited_logits, final_distribution, inverse_cdf, run_sampler

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.sampling_random import uniform

ROWS, PROMPT_LEN, EOS = 32, 5, (3, 9)
BAD_WORDS = [[7], [1, 2], [4, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k beyond the first candidates": {"top_k": 150, "temperature": 3.0},
    "top_k above the vocabulary": {"top_k": 10**6},
    "top_k off": {"top_k": -1},
    "top_p": {"top_p": 0.5},
    "top_p with a long nucleus": {"top_p": 0.97, "temperature": 8.0},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 20, "top_p": 0.8},
    "top_k, top_p and min_p": {"top_k": 50, "top_p": 0.95, "min_p": 0.05, "temperature": 1.7},
    "repetition": {"repetition_penalty": 1.8},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": -1.3},
    "all penalties": {"repetition_penalty": 0.7, "frequency_penalty": -0.4, "presence_penalty": 1.1},
    "logit_bias": {"logit_bias": {0: 5.0, 17: -100.0, 40: 2.5}},
    "allowed_token_ids": {"allowed_token_ids": [2, 3, 5, 7, 11, 13, 40]},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [11]},
    "min_tokens without EOS": {"min_tokens": 6, "ignore_eos": True},
    "everything": {
        "temperature": 1.2,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": {1: 3.0, 2: -3.0},
        "allowed_token_ids": list(range(0, 300, 2)),
        "min_tokens": 8,
    },
}


@pytest.mark.parametrize("vocab_size", [300, 9000], ids=["one stage", "many blocks"])
@pytest.mark.parametrize("temperature", [None, 0.0], ids=["sampled", "greedy"])
@pytest.mark.parametrize("name", CASES)
def test_the_token_is_the_one_the_reference_draws(name: str, temperature: float | None, vocab_size: int) -> None:
    params = SamplingParams(**{**CASES[name], **({} if temperature is None else {"temperature": temperature})})
    rng = np.random.default_rng(len(name))
    logits = (rng.standard_normal((ROWS, vocab_size)) * 2.5).astype(np.float32)
    known = [rng.integers(0, 20, PROMPT_LEN + row % 12).tolist() for row in range(ROWS)]
    seeds = list(range(ROWS))

    result = run_sampler(logits, [params] * ROWS, seeds, known, [PROMPT_LEN] * ROWS, [BAD_WORDS] * ROWS, EOS)

    expected = []
    for row in range(ROWS):
        x = edited_logits(logits[row], params, known[row], PROMPT_LEN, BAD_WORDS, EOS)
        if params.greedy:
            expected.append(int(x.argmax()))
        else:
            u = uniform(np.array([seeds[row]], dtype=np.uint64), np.array([len(known[row])]))[0]
            expected.append(inverse_cdf(final_distribution(x, params), u))
    assert result.token_ids.tolist() == expected
    assert params.greedy or "one" in name or len(set(expected)) > 2


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_is_asked_the_token_is_one_that_the_parameters_leave(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([2, 100, 128, 129, 1500]))
    ids = st.integers(0, vocab_size - 1)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 100.0])),
        top_k=data.draw(st.integers(-1, vocab_size + 2)),
        top_p=data.draw(st.floats(1e-9, 1.0)),
        min_p=data.draw(st.floats(0.0, 1.0)),
        repetition_penalty=data.draw(st.floats(0.1, 10.0)),
        frequency_penalty=data.draw(st.floats(-2.0, 2.0)),
        presence_penalty=data.draw(st.floats(-2.0, 2.0)),
        allowed_token_ids=data.draw(st.none() | st.lists(ids, min_size=1, max_size=5)),
        logit_bias=data.draw(st.none() | st.dictionaries(ids, st.floats(-100, 100), max_size=4)),
    )
    bad_words = data.draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=4))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0, 1e30]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (rng.integers(-3, 4, (1, vocab_size)) * scale).astype(np.float32)
    known = rng.integers(0, vocab_size, data.draw(st.integers(2, 9))).tolist()

    result = run_sampler(logits, [params], [data.draw(st.integers(-(2**63), 2**63 - 1))], [known], [2], [bad_words])

    token = int(result.token_ids[0])
    assert 0 <= token < vocab_size
    if params.allowed_token_ids is not None:
        assert token in params.allowed_token_ids
    left = edited_logits(logits[0], params, known, 2, bad_words)
    if np.isfinite(left).any():
        assert left[token] > -np.inf
