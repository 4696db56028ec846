"""Masks, biases and penalties on cases small enough to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from sampling_reference import run_sampler

from nanovllm_dist.sampling_params import SamplingParams

VOCAB_SIZE = 200
GREEDY = SamplingParams(temperature=0.0)


def greedy_token(
    logits: dict[int, float],
    params: SamplingParams = GREEDY,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    eos: Sequence[int] = (),
) -> int:
    """The token chosen where all but the given logits are -5."""
    row = np.full((1, VOCAB_SIZE), -5.0, dtype=np.float32)
    for token, value in logits.items():
        row[0, token] = value
    result = run_sampler(row, [params], [0], [[*prompt, *output]], [len(prompt)], [bad_words], eos)
    return int(result.token_ids[0])


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "expected"), [([], 7), ([5], 7), ([5, 6], 8), ([6, 5], 7), ([5, 6, 1], 7), ([1, 5, 6], 8)]
)
def test_a_bad_word_of_three_tokens_is_cut_at_its_last_one(output: list[int], expected: int) -> None:
    assert greedy_token({7: 2.0, 8: 1.0}, output=output, bad_words=[[5, 6, 7]]) == expected


def test_a_bad_word_begun_in_the_prompt_does_not_count() -> None:
    assert greedy_token({7: 2.0, 8: 1.0}, prompt=[5], output=[6], bad_words=[[5, 6, 7]]) == 7


def test_bad_words_of_different_lengths_apply_together() -> None:
    words = [[5, 7], [8], [1, 2, 5, 9]]

    assert greedy_token({7: 4.0, 8: 3.0, 9: 2.0, 10: 1.0}, output=[1, 2, 5], bad_words=words) == 10
    assert greedy_token({7: 4.0, 8: 3.0, 9: 2.0, 10: 1.0}, output=[2], bad_words=words) == 7


def test_min_tokens_bans_every_eos_and_stop_token_until_reached() -> None:
    params = greedy(min_tokens=2, stop_token_ids=[12])
    logits = {10: 4.0, 11: 3.0, 12: 2.0, 13: 1.0}

    assert greedy_token(logits, params, output=[], eos=[10, 11]) == 13
    assert greedy_token(logits, params, output=[1], eos=[10, 11]) == 13
    assert greedy_token(logits, params, output=[1, 1], eos=[10, 11]) == 10


def test_min_tokens_leaves_eos_alone_when_eos_is_ignored() -> None:
    assert greedy_token({10: 4.0}, greedy(min_tokens=2, ignore_eos=True), eos=[10]) == 10


def test_a_bias_of_100_forces_a_token_and_minus_100_forbids_it() -> None:
    assert greedy_token({10: 30.0, 11: -30.0}, greedy(logit_bias={11: 100.0})) == 11
    assert greedy_token({10: 30.0, 11: 20.0}, greedy(logit_bias={10: -100.0})) == 11


def test_a_bias_does_not_bring_back_a_banned_token() -> None:
    assert greedy_token({10: 3.0}, greedy(logit_bias={11: 100.0}), bad_words=[[11]]) == 10


def test_a_token_seen_three_times_is_repetition_penalized_once() -> None:
    # 6 / 2 = 3 stays above 2.9; a second division would not
    assert greedy_token({10: 6.0, 11: 2.9}, greedy(repetition_penalty=2.0), prompt=[10, 10], output=[10]) == 10
    assert greedy_token({10: 6.0, 11: 3.1}, greedy(repetition_penalty=2.0), prompt=[10, 10], output=[10]) == 11


def test_repetition_penalty_lowers_a_negative_logit_too() -> None:
    assert greedy_token({10: -1.0, 11: -1.5}, greedy(repetition_penalty=2.0), prompt=[10]) == 11


def test_frequency_penalty_counts_each_output_token_and_no_prompt_token() -> None:
    params = greedy(frequency_penalty=1.0)

    assert greedy_token({10: 3.0, 11: 0.1}, params, prompt=[10] * 9, output=[10, 10]) == 10
    assert greedy_token({10: 3.0, 11: 0.1}, params, prompt=[10], output=[10, 10, 10]) == 11


def test_presence_penalty_counts_an_output_token_once() -> None:
    assert greedy_token({10: 3.0, 11: 1.5}, greedy(presence_penalty=1.0), output=[10] * 8) == 10
    assert greedy_token({10: 2.0, 11: 1.5}, greedy(presence_penalty=1.0), output=[10]) == 11


def test_allowed_tokens_that_are_all_banned_still_give_an_allowed_one() -> None:
    params = greedy(allowed_token_ids=[20, 21])

    assert greedy_token({10: 9.0, 21: 1.0}, params, bad_words=[[20], [21]]) == 21


def test_an_allowed_token_is_taken_even_if_the_model_gives_it_no_probability() -> None:
    inf = float("inf")

    assert greedy_token({20: -inf, 21: -inf, 10: 9.0}, greedy(allowed_token_ids=[21, 20])) == 20


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    params = greedy(stop_token_ids=[10**6], min_tokens=1, logit_bias={10**6: 5.0})

    assert greedy_token({10: 1.0}, params, bad_words=[[10**6], [1, 10**6]], eos=[10**6]) == 10


def test_requests_without_edits_are_untouched_beside_one_with_edits() -> None:
    logits = np.random.default_rng(0).standard_normal((3, VOCAB_SIZE)).astype(np.float32)
    best = logits.argmax(-1).tolist()

    tokens = run_sampler(
        logits,
        [GREEDY, greedy(allowed_token_ids=[5], repetition_penalty=3.0), GREEDY],
        [0, 0, 0],
        [best[:1] * 4, best[1:2] * 4, best[2:] * 4],
        [1, 1, 1],
        [[], [[best[1]]], []],
    ).token_ids.tolist()

    assert tokens == [best[0], 5, best[2]]
