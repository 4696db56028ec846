"""Log-probabilities: of the raw logits, the chosen token first, then the likeliest ones in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sampling_reference import run_sampler

from nanovllm_dist.errors import WireError
from nanovllm_dist.outputs import unpack_logprobs
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import TokenLogprobs
from nanovllm_dist.workers.logprobs import prompt_logprobs


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def check(packed: TokenLogprobs, row: NDArray[np.float64], chosen: int, k: int) -> None:
    ids, values = unpack_logprobs(packed)
    assert ids == [chosen, *np.argsort(-row, kind="stable")[:k].tolist()]
    assert values == pytest.approx(row[ids], abs=1e-5)
    assert packed.rank == 1 + (row > row[chosen]).sum()


def test_rows_that_ask_get_the_raw_logprobs_of_the_token_they_drew() -> None:
    logits = (np.random.default_rng(0).standard_normal((6, 3000)) * 2).astype(np.float32)
    changed = {"temperature": 5.0, "logit_bias": {8: 3.0}, "repetition_penalty": 1.5}
    asked = [3, None, 0, 64, None, 1]
    params = [SamplingParams(logprobs=k, **changed) for k in asked]

    result = run_sampler(logits, params, list(range(6)), [[8, 9]] * 6, [1] * 6)

    assert [slot for slot, _ in result.logprobs] == [0, 2, 3, 5]
    for slot, packed in result.logprobs:
        k = asked[slot]
        assert k is not None
        check(packed, log_softmax(logits)[slot], int(result.token_ids[slot]), k)


def test_asking_for_logprobs_does_not_change_the_token() -> None:
    logits = np.random.default_rng(1).standard_normal((8, 1000)).astype(np.float32)

    with_logprobs = run_sampler(logits, [SamplingParams(logprobs=2)] * 8, list(range(8)), [[0]] * 8, [1] * 8)
    without = run_sampler(logits, [SamplingParams()] * 8, list(range(8)), [[0]] * 8, [1] * 8)

    assert with_logprobs.token_ids.tolist() == without.token_ids.tolist()
    assert without.logprobs == []


def test_the_greedy_token_has_rank_one_even_among_equals() -> None:
    logits = np.zeros((1, 400), dtype=np.float32)

    result = run_sampler(logits, [SamplingParams(temperature=0.0, logprobs=3)], [0], [[0]], [1])

    packed = result.logprobs[0][1]
    assert packed.rank == 1
    assert unpack_logprobs(packed)[0] == [0, 0, 1, 2]


@pytest.mark.parametrize("k", [0, 5])
def test_prompt_logprobs_cover_every_position_in_order(k: int) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((150, 700)) * 3).astype(np.float32)
    targets = rng.integers(0, 700, 150)

    packed = prompt_logprobs(torch.from_numpy(logits), torch.from_numpy(targets), k)

    assert len(packed) == 150
    for position, entry in enumerate(packed):
        check(entry, log_softmax(logits)[position], int(targets[position]), k)


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    logits = np.array([[0.5, 2.0, 1.0]], dtype=np.float32)

    packed = prompt_logprobs(torch.from_numpy(logits), torch.tensor([2]), 20)[0]

    assert unpack_logprobs(packed)[0] == [2, 1, 2, 0]


def test_packed_numbers_are_little_endian_and_torn_ones_are_refused() -> None:
    packed = prompt_logprobs(torch.zeros(1, 2), torch.tensor([1]), 0)[0]

    assert packed.ids == b"\x01\x00\x00\x00"
    assert packed.values == np.array([-np.log(2)], dtype="<f4").tobytes()
    with pytest.raises(WireError, match="int32"):
        unpack_logprobs(TokenLogprobs(b"\x01\x00", b"", 1))
