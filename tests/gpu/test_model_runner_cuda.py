"""One rank's ModelRunner on a GPU: by graphs and by single launches it computes the same.

Two runners get the same steps. In fp32 their tokens are equal and so are their caches, but for what sums in another
order round. In bf16 both are near the fp32 run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL_VOCAB, make_small_checkpoint, random_tokens
from driven_runner import DEVICE, MAX_LEN, MAX_NUM_SEQS, MAX_TOKENS, Row, Runner, tokens_of

from nanovllm_dist.outputs import unpack_logprobs
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.batch import StepShape
from nanovllm_dist.workers.graphs import chunk_shapes, decode_sizes

SIZES = decode_sizes(MAX_NUM_SEQS)
SHAPES = chunk_shapes(MAX_TOKENS, MAX_NUM_SEQS)
DECODES = 3
# Keys and values are of size 1 to 5; fp32 rounds sums of a few hundred terms at about 1e-6 of that
CACHE_TOLERANCE = 1e-4
# Log-probabilities in bf16 against fp32: the worst of three thousand, and the mean. On a CPU 0.20 and 0.04
BF16_WORST, BF16_MEAN = 0.5, 0.1


def prompt_of(length: int, seed: int) -> list[int]:
    return random_tokens(length, seed, SMALL_VOCAB)


def plain_rows(count: int, seed: int, longest: int = 60) -> list[Row]:
    """`count` rows in shuffled slots, those with one token first; every fourth is drawn, the others are greedy."""
    rng = random.Random(seed)
    rows = []
    for index, slot in enumerate(rng.sample(range(MAX_NUM_SEQS), count)):
        params = SamplingParams(temperature=0.0 if index % 4 else 0.5, seed=slot, ignore_eos=True)
        rows.append(Row(slot, prompt_of(rng.randint(1, longest), 1000 * seed + slot), params))
    return sorted(rows, key=lambda row: len(row.prompt) > 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3, with heads of 96 in groups of three."""
    return make_small_checkpoint(tmp_path_factory.mktemp("small")).directory


@pytest.fixture(scope="module")
def graphs(model: Path) -> Runner:
    """As a user gets it."""
    return Runner(model)


@pytest.fixture(scope="module")
def eager(model: Path) -> Runner:
    """Every operation launched by itself."""
    return Runner(model, enforce_eager=True)


def same_caches(graphs: Runner, eager: Runner) -> None:
    for mine, other in zip(graphs.cache(), eager.cache(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=CACHE_TOLERANCE)


# --- graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("below", "size"), list(pairwise([0, *SIZES])))
def test_decodes_of_every_graph_size_and_padded_ones(graphs: Runner, eager: Runner, below: int, size: int) -> None:
    for count in sorted({below + 1, size - 1, size} - {below}):
        rows = plain_rows(count, seed=count)
        assert graphs.prefill(rows) == eager.prefill(rows)
        ones = [(row.slot, 1) for row in rows]
        for number in range(DECODES):
            random.Random(number).shuffle(ones)  # a row's place in the step says nothing about its slot
            assert tokens_of(graphs.run(ones)) == tokens_of(eager.run(ones)), f"decode {number} of {count} rows"
        same_caches(graphs, eager)
    assert eager.recorded == 0


@pytest.mark.parametrize("longest", [1, 2, 7, 16, 60, 200])
@pytest.mark.parametrize("decodes", [0, 1, 5])
def test_steps_that_prefill(graphs: Runner, eager: Runner, longest: int, decodes: int) -> None:
    rows = plain_rows(decodes + 12, seed=longest)
    running = rows[:decodes]
    if running:
        assert graphs.prefill(running) == eager.prefill(running)
    entering = [Row(row.slot, prompt_of(longest, row.slot), row.params) for row in rows[decodes:]]
    for row in entering:  # one more in each step, beside the decodes
        counts = [*((other.slot, 1) for other in running), (row.slot, longest)]
        counts.sort(key=lambda one: one[1])
        assert tokens_of(graphs.run(counts, [row])) == tokens_of(eager.run(counts, [row]))
        running.append(row)
    same_caches(graphs, eager)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefills_of_every_graph_shape_and_padded_ones(graphs: Runner, eager: Runner, shape: StepShape) -> None:
    for total in (shape.tokens, shape.tokens - 13):
        for count in {-(-total // (MAX_LEN - 2)), min(shape.prefills, total)}:
            rows = rows_of(total, count)
            assert graphs.prefill(rows) == eager.prefill(rows), f"{total} tokens of {count} rows"
            same_caches(graphs, eager)


def rows_of(total: int, count: int) -> list[Row]:
    """`count` greedy rows of `total` tokens, cut into prompts of about the same length, those of one token first."""
    cuts = [total * index // count for index in range(count + 1)]
    text = prompt_of(total, seed=total)
    rows = [Row(slot, text[a:b], SamplingParams(temperature=0.0)) for slot, (a, b) in enumerate(pairwise(cuts))]
    return sorted(rows, key=lambda row: len(row.prompt) > 1)


def test_a_prompt_in_chunks(graphs: Runner, eager: Runner) -> None:
    rows = plain_rows(3, seed=5)
    row = Row(rows[0].slot, prompt_of(200, 5), rows[0].params)
    whole = eager.prefill([row])
    for runner in (graphs, eager):
        runner.prefill(rows[1:])
        entering: list[Row] = [row]
        for chunk in (64, 1, 64, 70):  # a chunk of one token is no decode: it samples nothing
            result = runner.run([(row.slot, chunk)], entering)
            assert tokens_of(result) == []
            entering = []
        assert tokens_of(runner.run([(row.slot, 1)])) == whole
    same_caches(graphs, eager)


def test_rows_that_want_more_than_a_plain_draw(graphs: Runner, eager: Runner) -> None:
    plain = plain_rows(12, seed=6)
    alone: list[list[int]] = [eager.prefill(plain)]
    for _ in range(6):
        alone.append(tokens_of(eager.run([(row.slot, 1) for row in plain])))
    free = sorted(set(range(MAX_NUM_SEQS)) - {row.slot for row in plain})
    wanted = [
        SamplingParams(temperature=0.8, top_k=4, seed=1),
        SamplingParams(temperature=0.6, top_p=0.7, seed=2),
        SamplingParams(temperature=0.8, min_p=0.1, seed=3),
        SamplingParams(temperature=0.0, logprobs=4),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
        SamplingParams(temperature=0.0, logit_bias={7: 50.0}),
        SamplingParams(temperature=0.3, allowed_token_ids=[1, 2, 3], seed=4),
        SamplingParams(temperature=0.0),
    ]
    special = [
        Row(slot, prompt_of(20, slot), params, bad_words=() if index < 7 else ((5,), (8, 9)))
        for index, (slot, params) in enumerate(zip(free, wanted, strict=False))
    ]
    rows = plain + special
    for runner in (graphs, eager):
        found = [runner.run([(row.slot, len(row.prompt)) for row in rows], rows)]
        found += [runner.run([(row.slot, 1) for row in rows]) for _ in range(6)]
        assert [tokens_of(result)[: len(plain)] for result in found] == alone
        assert all(tokens_of(result)[len(plain) + 5] == 7 for result in found)
        assert all([slot for slot, _ in result.logprobs] == [special[3].slot] for result in found)
    same_caches(graphs, eager)


def test_after_every_size_has_been_seen_nothing_is_recorded(graphs: Runner) -> None:
    rows = plain_rows(MAX_NUM_SEQS, seed=8)

    def all_counts() -> None:
        graphs.prefill(rows)
        for count in range(1, MAX_NUM_SEQS + 1):
            graphs.run([(row.slot, 1) for row in rows[:count]])

    all_counts()
    before = graphs.recorded
    assert DEVICE == "cpu" or before >= len(SIZES)
    all_counts()
    assert graphs.recorded == before


# --- two steps in flight -----------------------------------------------------------------------------------


def script() -> list[tuple[list[tuple[int, int]], list[Row]]]:
    """Steps of all kinds: prefills, decodes, both, fewer rows, a slot that is taken over."""
    rows = plain_rows(20, seed=9)
    first, later = rows[:15], rows[15:]
    ones = [(row.slot, 1) for row in first]
    again = Row(first[0].slot, prompt_of(33, 33), first[0].params)
    mixed = [*ones, *((row.slot, len(row.prompt)) for row in sorted(later, key=lambda row: len(row.prompt)))]
    return [
        ([(row.slot, len(row.prompt)) for row in first], first),
        (ones, []),
        (ones, []),
        (sorted(mixed, key=lambda one: one[1]), later),
        ([(row.slot, 1) for row in rows], []),
        (ones[3:8], []),
        ([*ones[1:4], (again.slot, 33)], [again]),
        ([(again.slot, 1)], []),
        (ones, []),
    ]


@pytest.mark.parametrize("kind", ["graphs", "eager"])
def test_two_steps_in_flight_equal_one_at_a_time(kind: str, request: pytest.FixtureRequest) -> None:
    runner: Runner = request.getfixturevalue(kind)
    one_by_one = [tokens_of(runner.run(counts, entering)) for counts, entering in script()]
    cache = [part.clone() for part in runner.cache()]
    found, running = [], None
    for counts, entering in script():
        following = runner.start(counts, entering)
        if running is not None:
            found.append(tokens_of(running.result()))
        running = following
    assert running is not None
    found.append(tokens_of(running.result()))
    assert found == one_by_one
    for mine, other in zip(runner.cache(), cache, strict=True):
        assert torch.equal(mine, other)


# --- bf16 --------------------------------------------------------------------------------------------------


def test_bf16_is_near_fp32(model: Path, eager: Runner) -> None:
    rows = [
        Row(row.slot, [*row.prompt, 1], SamplingParams(temperature=0.0, logprobs=64))
        for row in plain_rows(48, seed=10, longest=120)
    ]
    right = logprobs_of(eager, rows)
    for options in ({}, {"enforce_eager": True}):
        found = logprobs_of(Runner(model, "bfloat16", **options), rows)
        errors = [
            abs(mine[token] - row[token])
            for mine, row in zip(found, right, strict=True)
            for token in mine.keys() & row.keys()
        ]
        assert len(errors) > 32 * len(rows)  # most of the likeliest tokens are the same
        assert max(errors) < BF16_WORST
        assert sum(errors) / len(errors) < BF16_MEAN


def logprobs_of(runner: Runner, rows: Sequence[Row]) -> list[dict[int, float]]:
    """The likeliest tokens of each row, found by a decode of the prompt's last token: nothing sampled comes before."""
    runner.run([(row.slot, len(row.prompt) - 1) for row in rows], rows)
    result = runner.run([(row.slot, 1) for row in rows])
    by_slot = {slot: dict(zip(*unpack_logprobs(entry), strict=True)) for slot, entry in result.logprobs}
    assert all(0 <= token < SMALL_VOCAB for tokens in by_slot.values() for token in tokens)
    return [by_slot[row.slot] for row in rows]
