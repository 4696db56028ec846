"""The sampling kernels: the token in which the uniform falls, the argmax, and the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.sampler import Sampler
from nanovllm_dist.workers.sampling_random import uniform
from nanovllm_dist.workers.sampling_table import SamplingTable

kernels = pytest.importorskip("nanovllm_dist.workers.kernels.sampling", reason="no CUDA GPU")

DEVICE = "cuda"
VOCAB = 151_936
LARGEST_UNIFORM = 1 - 2.0**-53
# How far outside a token's interval of the exact CDF its uniform may lie: sums of fp32 terms, each within 1e-6
TOLERANCE = 1e-6


def random_logits(rows: int, vocab: int, scale: float, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype).to(DEVICE)


def uniforms_of(rows: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(uniform(np.arange(rows, dtype=np.uint64) + np.uint64(seed), np.arange(rows))).to(DEVICE)


def inverse(temperatures: Sequence[float]) -> Tensor:
    return torch.tensor([1 / t if t else 0.0 for t in temperatures], dtype=torch.float32, device=DEVICE)


def sample(logits: Tensor, uniforms: Tensor, inv_temperature: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    """Tokens of ranks that hold the columns between `cuts`, summed over the ranks; one rank without `cuts`.

    The tensors of all ranks are as wide as the widest; what lies behind a rank's range is poison.
    """
    rows, vocab = logits.shape
    edges = [0, *cuts, vocab]
    ranges = list(pairwise(edges))
    width = max(end - start for start, end in ranges)
    shards, statistics = [], torch.empty(len(ranges), rows, kernels.num_chunks(width), 2, device=DEVICE)
    for rank, (start, end) in enumerate(ranges):
        shard = torch.full((rows, width), float("nan"), dtype=logits.dtype, device=DEVICE)
        shard[:, : end - start] = logits[:, start:end]
        shards.append(shard)
        kernels.shard_statistics(shard, inv_temperature, statistics[rank], vocab_local=end - start)
    tokens = [
        kernels.choose(
            statistics,
            shards[rank],
            uniforms,
            inv_temperature,
            torch.empty(rows, dtype=torch.int64, device=DEVICE),
            rank=rank,
            vocab_start=start,
            vocab_local=end - start,
        )
        for rank, (start, end) in enumerate(ranges)
    ]
    return torch.stack(tokens).sum(0)


def assert_drawn(logits: Tensor, uniforms: Tensor, inv_temperature: Tensor, tokens: Tensor) -> None:
    """Each uniform lies in its token's interval of the row's CDF in float64, and the token has some probability."""
    exact = logits.double()
    weights = ((exact - exact.amax(-1, keepdim=True)) * inv_temperature.double().unsqueeze(1)).exp()
    until = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    ends = until.gather(1, tokens.unsqueeze(1)).squeeze(1)
    starts = torch.where(tokens > 0, until.gather(1, (tokens - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    assert ((uniforms >= starts - TOLERANCE) & (uniforms <= ends + TOLERANCE)).all()
    assert (weights.gather(1, tokens.unsqueeze(1)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
def test_the_uniform_lies_in_the_interval_of_the_token_drawn(dtype: torch.dtype, scale: float) -> None:
    temperatures = [1e-3, 0.1, 0.6, 1.0, 3.0, 100.0] * 4
    logits = random_logits(len(temperatures), VOCAB, scale, dtype)
    uniforms, inv_temperature = uniforms_of(len(temperatures)), inverse(temperatures)

    assert_drawn(logits, uniforms, inv_temperature, sample(logits, uniforms, inv_temperature))


@pytest.mark.parametrize("vocab", [1, 5, 2047, 2048, 2049, 5000, 49_152])
def test_any_size_of_vocabulary_is_drawn_from_to_its_ends(vocab: int) -> None:
    logits, inv_temperature = random_logits(18, vocab, 1.0), inverse([1.0, 0.3, 20.0] * 6)
    uniforms = uniforms_of(18)
    uniforms[:6] = 0.0
    uniforms[6:12] = LARGEST_UNIFORM

    tokens = sample(logits, uniforms, inv_temperature)

    assert_drawn(logits, uniforms, inv_temperature, tokens)
    assert tokens[:6].tolist() == [0] * 6


def test_a_masked_token_is_never_drawn() -> None:
    logits = random_logits(64, 9000, 1.0)
    logits[:, :4096] = float("-inf")
    logits[:, 4100:] = float("-inf")
    logits[::2, 8999] = 5.0
    uniforms = uniforms_of(64)
    uniforms[:16], uniforms[16:32] = 0.0, LARGEST_UNIFORM

    tokens = sample(logits, uniforms, inverse([1.0, 0.01, 100.0, 0.5] * 16))

    assert set(tokens.tolist()) <= {4096, 4097, 4098, 4099, 8999}
    assert len(set(tokens.tolist())) == 5
    assert tokens[:16:4].tolist() == [4096] * 4
    assert tokens[16:32:4].tolist() == [8999] * 4


def test_a_uniform_beyond_all_but_one_token_draws_that_token() -> None:
    logits = torch.full((2, 6000), -100.0, dtype=torch.float32, device=DEVICE)
    logits[:, 5000] = 100.0
    uniforms = torch.tensor([0.0, LARGEST_UNIFORM], dtype=torch.float64, device=DEVICE)

    assert sample(logits, uniforms, inverse([1.0, 1.0])).tolist() == [5000, 5000]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_greedy_takes_the_lowest_of_the_largest(dtype: torch.dtype) -> None:
    logits = random_logits(32, 10_000, 2.0, dtype)
    peak = logits.amax(-1)
    for row in range(1, 32):
        logits[row, [9000 - 100 * row, 9500]] = peak[row]

    tokens = sample(logits, uniforms_of(32), inverse([0.0] * 32), cuts=[4000])

    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert tokens.tolist() == first


@pytest.mark.parametrize("cuts", [[], [2048, 4096], [1000]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_a_distribution_gives_a_token_and_harms_no_other(cuts: list[int], temperature: float) -> None:
    logits = random_logits(6, 5000, 1.0)
    clean = logits.clone()
    logits[1, [3000, 4500]] = float("inf")
    logits[2, 4999] = float("nan")
    logits[3] = float("-inf")
    logits[4, 10], logits[4, 4000] = float("nan"), float("inf")
    uniforms, inv_temperature = uniforms_of(6), inverse([temperature] * 6)

    tokens = sample(logits, uniforms, inv_temperature, cuts)

    assert tokens[1:5].tolist() == [3000, 4999, 0, 10]
    assert tokens[[0, 5]].tolist() == sample(clean, uniforms, inv_temperature, cuts)[[0, 5]].tolist()


def test_frequencies_follow_the_distribution() -> None:
    vocab, batch, draws, temperature = 300, 10_000, 100_000, 0.8
    logits = random_logits(1, vocab, 2.0, torch.float32)
    counts = np.zeros(vocab)

    for first in range(0, draws, batch):
        uniforms = torch.from_numpy(uniform(np.full(batch, 1234, np.uint64), np.arange(first, first + batch)))
        tokens = sample(logits.expand(batch, vocab), uniforms.to(DEVICE), inverse([temperature] * batch))
        counts += np.bincount(tokens.cpu().numpy(), minlength=vocab)

    expected = (logits[0].double() / temperature).softmax(-1).cpu().numpy() * draws
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_gives_the_same_token_in_any_batch_and_order() -> None:
    rows = 48
    logits, uniforms = random_logits(rows, 50_257, 1.0), uniforms_of(rows)
    inv_temperature = inverse([0.0, 0.6, 1.0, 50.0] * 12)
    together = sample(logits, uniforms, inv_temperature)

    for order in (torch.randperm(rows, generator=torch.Generator().manual_seed(1)), *torch.arange(rows).split(1)):
        order = order.to(DEVICE)
        alone = sample(logits[order], uniforms[order], inv_temperature[order])
        assert alone.tolist() == together[order].tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_that_start_at_a_chunk_give_the_tokens_of_one_rank_to_the_bit(ranks: int) -> None:
    rows, vocab = 512, 30_000
    logits, uniforms = random_logits(rows, vocab, 0.01, torch.float32), uniforms_of(rows)
    inv_temperature = inverse([0.0, 0.6, 1.0, 50.0] * (rows // 4))
    per_rank = -(-kernels.num_chunks(vocab) // ranks)
    cuts = [rank * per_rank * kernels.CHUNK for rank in range(1, ranks)]

    alone = sample(logits, uniforms, inv_temperature)

    assert sample(logits, uniforms, inv_temperature, cuts).tolist() == alone.tolist()
    assert sample(logits, uniforms, inv_temperature, [kernels.CHUNK, *cuts[1:]]).tolist() == alone.tolist()


@pytest.mark.parametrize("cuts", [[75_968], [50_646, 101_291], [37_984, 75_968, 113_952]], ids=len)
def test_ranks_that_start_anywhere_draw_from_the_same_distribution(cuts: list[int]) -> None:
    logits, uniforms = random_logits(64, VOCAB, 3.0), uniforms_of(64)
    inv_temperature = inverse([0.3, 0.6, 1.0, 50.0] * 16)

    assert_drawn(logits, uniforms, inv_temperature, sample(logits, uniforms, inv_temperature, cuts))


def test_rows_may_lie_apart_and_columns_behind_the_vocabulary_are_not_read() -> None:
    rows, vocab = 8, 5000
    logits, uniforms, inv_temperature = random_logits(rows, vocab, 1.0), uniforms_of(rows), inverse([0.0, 1.0] * 4)
    wide = torch.full((rows, 9001), float("inf"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, :vocab] = logits
    view = wide[:, :8500]
    statistics = torch.empty(1, rows, kernels.num_chunks(8500), 2, device=DEVICE)
    kernels.shard_statistics(view, inv_temperature, statistics[0], vocab_local=vocab)
    out = torch.empty(rows, dtype=torch.int64, device=DEVICE)

    kernels.choose(statistics, view, uniforms, inv_temperature, out, rank=0, vocab_start=0, vocab_local=vocab)

    assert out.tolist() == sample(logits, uniforms, inv_temperature).tolist()
    padding = statistics[0, :, kernels.num_chunks(vocab) :]
    assert (padding[..., 0] == float("-inf")).all()
    assert (padding[..., 1] == 0).all()


def test_seed_and_position_give_the_token_of_the_torch_sampler() -> None:
    rows, steps, temperature = 256, 400, 0.6
    logits = random_logits(rows, VOCAB, 3.0, torch.float32)
    table = SamplingTable(rows, VOCAB, (), DEVICE)
    for slot in range(rows):
        table.set(slot, SamplingParams(temperature=temperature), 77 + slot, 1, [])
    sampler, known = Sampler(table), torch.zeros(rows, 1, dtype=torch.int32, device=DEVICE)
    slots, inv_temperature = np.arange(rows), inverse([temperature] * rows)
    different = 0

    for position in range(steps):
        lengths = np.full(rows, position)
        uniforms = torch.from_numpy(uniform(table.seed, lengths)).to(DEVICE)
        tokens = sample(logits, uniforms, inv_temperature)
        different += int((tokens != sampler.sample(logits.clone(), slots, lengths, known).token_ids).sum())

    # exp differs in the last bits between the two, which moves the borders of tokens of small mass
    assert different < rows * steps * 1e-3


def test_a_captured_graph_replays_with_new_logits_and_uniforms() -> None:
    rows, vocab = 4, 20_000
    logits, uniforms, inv_temperature = random_logits(rows, vocab, 1.0), uniforms_of(rows), inverse([0.0, 0.6] * 2)
    statistics = torch.empty(1, rows, kernels.num_chunks(vocab), 2, device=DEVICE)
    out = torch.empty(rows, dtype=torch.int64, device=DEVICE)

    def step() -> None:
        kernels.shard_statistics(logits, inv_temperature, statistics[0], vocab_local=vocab)
        kernels.choose(statistics, logits, uniforms, inv_temperature, out, rank=0, vocab_start=0, vocab_local=vocab)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    for seed in (1, 2, 3):
        logits.copy_(random_logits(rows, vocab, 1.0, seed=seed))
        uniforms.copy_(uniforms_of(rows, seed))
        graph.replay()
        assert out.tolist() == sample(logits, uniforms, inv_temperature).tolist()


def test_tensors_that_do_not_fit_are_refused() -> None:
    logits, inv_temperature = random_logits(2, 5000, 1.0), inverse([0.0, 1.0])
    statistics, out = torch.empty(1, 2, 3, 2, device=DEVICE), torch.empty(2, dtype=torch.int64, device=DEVICE)
    place = {"rank": 0, "vocab_start": 0, "vocab_local": 5000}

    with pytest.raises(ValueError, match="statistics"):
        kernels.shard_statistics(logits, inv_temperature, statistics[0, :, :2], vocab_local=5000)
    with pytest.raises(ValueError, match="5001 tokens"):
        kernels.shard_statistics(logits, inv_temperature, statistics[0], vocab_local=5001)
    with pytest.raises(ValueError, match="inverse temperatures"):
        kernels.shard_statistics(logits, inv_temperature.double(), statistics[0], vocab_local=5000)
    with pytest.raises(ValueError, match="float64 uniforms"):
        kernels.choose(statistics, logits, uniforms_of(2).float(), inv_temperature, out, **place)
    with pytest.raises(ValueError, match="rank 1"):
        kernels.choose(statistics, logits, uniforms_of(2), inv_temperature, out, **{**place, "rank": 1})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 32, 257])
def test_tokens_are_written_behind_their_places(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    places = torch.randperm(1000, generator=generator)[:rows].to(DEVICE)
    tokens = torch.randint(VOCAB, (rows,), generator=generator).to(DEVICE)
    table = torch.full((1001,), -1, dtype=dtype, device=DEVICE)
    assert kernels.append_tokens(table, places, tokens) is tokens
    assert torch.equal(table[places + 1], tokens.to(dtype))
    assert int((table >= 0).sum()) == rows


def test_tokens_that_do_not_fit_their_places_are_refused() -> None:
    table, places = torch.zeros(9, dtype=torch.int32, device=DEVICE), torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="2 tokens"):
        kernels.append_tokens(table, places, places[:2])
    with pytest.raises(ValueError, match="int32"):
        kernels.append_tokens(table, places, places.int())
    with pytest.raises(ValueError, match="strides"):
        kernels.append_tokens(table[::2], places, places)
