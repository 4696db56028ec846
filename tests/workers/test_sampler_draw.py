"""The draw: exact frequencies, independence from the batch, and rows that have no proper distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_reference import final_distribution, run_sampler

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.sampler import Sampler
from nanovllm_dist.workers.sampling_blocks import block_max
from nanovllm_dist.workers.sampling_draw import DrawOptions, draw, draw_filtered
from nanovllm_dist.workers.sampling_random import uniform
from nanovllm_dist.workers.sampling_table import SamplingTable

LARGEST_UNIFORM = 1 - 2.0**-53
MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5, min_p=0.02),
    SamplingParams(top_k=3),
    SamplingParams(top_k=700),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=20.0, top_p=0.9),
    SamplingParams(top_k=40, top_p=0.9, repetition_penalty=1.3),
]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=40),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8, min_p=0.1),
    ],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_frequencies_over_positions_follow_the_distribution(params: SamplingParams) -> None:
    vocab_size, draws, batch = 300, 20_000, 1000
    logits = (np.random.default_rng(0).standard_normal(vocab_size) * 2).astype(np.float32)
    table = SamplingTable(1, vocab_size, (), "cpu")
    table.set(0, params, 1234, 1, [])
    sampler, known = Sampler(table), torch.zeros(1, 1, dtype=torch.int32)
    slots = np.zeros(batch, dtype=np.int64)
    counts = np.zeros(vocab_size)

    for first in range(1, draws, batch):
        rows = torch.from_numpy(np.tile(logits, (batch, 1)))
        tokens = sampler.sample(rows, slots, np.arange(first, first + batch), known).token_ids
        counts += np.bincount(tokens.numpy(), minlength=vocab_size)

    expected = final_distribution(logits.astype(np.float64), params) * draws
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_gives_the_same_token_in_any_batch_and_order() -> None:
    rng = np.random.default_rng(1)
    rows = 24
    logits = (rng.standard_normal((rows, 4097)) * 2).astype(np.float32)
    params = [MIXED[row % len(MIXED)] for row in range(rows)]
    known = [rng.integers(0, 50, 4 + row).tolist() for row in range(rows)]

    def run(order: list[int]) -> dict[int, int]:
        picked = [[params[row] for row in order], order, [known[row] for row in order]]
        tokens = run_sampler(logits[order], *picked, [4] * len(order)).token_ids.tolist()
        return dict(zip(order, tokens, strict=True))

    together = run(list(range(rows)))
    assert run(rng.permutation(rows).tolist()) == together
    assert run(list(range(0, rows, 3))) == {row: together[row] for row in range(0, rows, 3)}
    for row in range(rows):
        assert run([row]) == {row: together[row]}


def test_a_reused_slot_keeps_nothing_of_the_request_before_it() -> None:
    logits = (np.random.default_rng(2).standard_normal((1, 500)) * 2).astype(np.float32)
    heavy = SamplingParams(
        top_k=3,
        top_p=0.5,
        min_p=0.5,
        temperature=0.1,
        repetition_penalty=2.0,
        logprobs=5,
        prompt_logprobs=2,
        allowed_token_ids=[1],
        logit_bias={1: 9.0},
        min_tokens=9,
        max_tokens=20,
    )
    plain = SamplingParams()
    used, fresh = SamplingTable(1, 500, (4,), "cpu"), SamplingTable(1, 500, (4,), "cpu")
    used.set(0, heavy, 7, 1, [[2], [3, 4]])

    for table in (used, fresh):
        table.set(0, plain, 11, 2, [])

    results = [
        Sampler(table).sample(
            torch.from_numpy(logits.copy()), np.array([0]), np.array([3]), torch.ones(1, 3, dtype=torch.int32)
        )
        for table in (used, fresh)
    ]
    assert results[0].token_ids.tolist() == results[1].token_ids.tolist()
    assert results[0].logprobs == []
    assert used.edits == [None]
    assert used.prompt_logprobs_of(0) == 0


def test_another_position_or_seed_draws_another_token() -> None:
    logits = np.zeros((50, 100_000), dtype=np.float32)

    by_position = run_sampler(logits, [SamplingParams()] * 50, [5] * 50, [[0] * n for n in range(1, 51)], [1] * 50)
    by_seed = run_sampler(logits, [SamplingParams()] * 50, list(range(50)), [[0]] * 50, [1] * 50)

    assert len(set(by_position.token_ids.tolist())) > 45
    assert len(set(by_seed.token_ids.tolist())) > 45


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-60),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=1e-300, min_p=1.0, top_k=9),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1),
    ],
    ids=repr,
)
def test_an_extreme_parameter_gives_the_argmax(params: SamplingParams) -> None:
    logits = (np.random.default_rng(3).standard_normal((64, 5000)) * 100).astype(np.float32)

    tokens = run_sampler(logits, [params] * 64, list(range(64)), [[0]] * 64, [1] * 64).token_ids

    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_equal_logits_at_the_edge_of_top_k_are_taken_in_order_of_id() -> None:
    logits = np.zeros((200, 20_000), dtype=np.float32)
    logits[:, 19_000] = 1.0

    tokens = run_sampler(logits, [SamplingParams(top_k=4)] * 200, list(range(200)), [[0]] * 200, [1] * 200).token_ids

    assert set(tokens.tolist()) == {0, 1, 2, 19_000}


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = np.zeros((2, 1000), dtype=np.float32)
    logits[0, [333, 334, 900]] = 2.0
    logits[1, 999] = 2.0

    tokens = run_sampler(logits, [SamplingParams(temperature=0.0)] * 2, [0, 0], [[0]] * 2, [1] * 2).token_ids

    assert tokens.tolist() == [333, 999]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = np.full((2000, 700), -1e9, dtype=np.float32)
    logits[:, [130, 500]] = 0.0

    tokens = run_sampler(logits, [SamplingParams()] * 2000, list(range(2000)), [[0]] * 2000, [1] * 2000).token_ids

    assert set(tokens.tolist()) == {130, 500}


@pytest.mark.parametrize("params", MIXED, ids=repr)
def test_a_broken_row_gets_a_defined_token_and_leaves_the_others_alone(params: SamplingParams) -> None:
    logits = np.random.default_rng(4).standard_normal((5, 2000)).astype(np.float32)
    clean = run_sampler(logits, [params] * 5, list(range(5)), [[0]] * 5, [1] * 5).token_ids.tolist()
    logits[1, 1500:] = np.nan
    logits[2, [700, 800]] = np.inf
    logits[3] = -np.inf

    tokens = run_sampler(logits, [params] * 5, list(range(5)), [[0]] * 5, [1] * 5).token_ids.tolist()

    assert tokens == [clean[0], 1500, 700, 0, clean[4]]


def test_one_long_vocabulary_row_is_summed_exactly_enough_to_be_uniform() -> None:
    # with float32 running sums over 151,936 equal weights the last tokens are drawn too rarely or never
    vocab_size, draws = 151_936, 64
    logits = np.zeros((1, vocab_size), dtype=np.float32)
    sampled = [
        run_sampler(logits, [SamplingParams()], [seed], [[0]], [1]).token_ids.item() / vocab_size
        for seed in range(draws)
    ]
    wanted = uniform(np.arange(draws, dtype=np.uint64), np.ones(draws, dtype=np.int64))
    assert np.abs(np.array(sampled) - wanted).max() <= 1.0 / vocab_size


def test_a_low_temperature_still_draws_between_logits_that_are_close() -> None:
    logits = np.full((200, 300), -10.0, dtype=np.float32)
    logits[:, 7], logits[:, 8] = 0.0, 0.001

    params = SamplingParams(temperature=0.001)
    tokens = run_sampler(logits, [params] * 200, list(range(200)), [[0]] * 200, [1] * 200).token_ids.tolist()

    assert set(tokens) == {7, 8}
    assert 35 <= tokens.count(7) <= 75  # 200 / (1 + e) = 54


def options(rows: int, uniform_value: float, top_k: int = 0, temperature: float = 1.0) -> DrawOptions:
    return DrawOptions(
        temperature=np.full(rows, temperature, dtype=np.float32),
        top_k=np.full(rows, top_k, dtype=np.int64),
        top_p=np.ones(rows, dtype=np.float64),
        min_p=np.zeros(rows, dtype=np.float32),
        uniform=np.full(rows, uniform_value),
    )


@pytest.mark.parametrize("top_k", [0, 4000])
def test_the_ends_of_the_unit_interval_give_the_first_and_last_possible_token(top_k: int) -> None:
    rows, vocab_size = 300, 4500
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    logits[:, :40] = -1e9
    logits[:, 4040:] = -1e9
    draw_rows = draw_filtered if top_k else draw

    first = draw_rows(logits.clone(), block_max(logits), options(rows, 0.0, top_k))
    last = draw_rows(logits.clone(), block_max(logits), options(rows, LARGEST_UNIFORM, top_k))

    assert first.tolist() == [40] * rows
    assert last.tolist() == [4039] * rows


def test_the_largest_uniform_is_not_rounded_past_thousands_of_equal_tokens() -> None:
    logits = torch.full((1, 9000), -1e9)
    logits[:, :8500] = 0.0

    token = draw_filtered(logits, block_max(logits), options(1, LARGEST_UNIFORM, top_k=8800))

    assert token.tolist() == [8499]
