"""The sampler of the Ascend path, on CPU tensors: the plain distribution, and equal tokens on every rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nanovllm_dist.models.layers.embedding import LMHead, VocabWeight
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.workers.platform.npu_sampler import NpuSampler

CPU = torch.device("cpu")
VOCAB = 5003  # three chunks, the last one short; ranks get uneven parts
ROWS = 64
# fp32 moves the edges between the tokens' shares of [0, 1) by about this much
NEAR_EDGE = 2e-5


class RankOfThreads(SingleRank):
    """A Communicator whose ranks are threads."""

    def __init__(self, rank: int, parts: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._parts[self.rank] = tensor.clone()
        self._barrier.wait()
        whole = torch.stack(self._parts)
        self._barrier.wait()
        return whole

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.all_gather(tensor).sum(0)


def sampled(
    logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor, ranks: int
) -> list[torch.Tensor]:
    """Each rank's tokens for whole logits [rows, vocab], which are cut among them as the model does."""
    parts = [torch.empty(0)] * ranks
    barrier = threading.Barrier(ranks, timeout=60)

    def rank_main(rank: int) -> torch.Tensor:
        comm = RankOfThreads(rank, parts, barrier)
        rows = VocabWeight("head", logits.shape[1], 8, comm, torch.float32, CPU)
        head = LMHead(rows, False, comm)
        own = torch.zeros(len(logits), head.columns, dtype=logits.dtype)
        own[:, : head.vocab_size] = logits[:, rows.start : rows.end]
        own[:, head.vocab_size :] = 1e4  # padding that must never be seen
        return NpuSampler(comm, head).sample(own, inv_temperature, uniforms)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank_main, range(ranks)))


def case(spread: float = 3.0, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, inverse temperatures of which every fourth is greedy, uniforms."""
    generator = torch.Generator().manual_seed(5)
    logits = spread * torch.randn(ROWS, vocab, generator=generator)
    inv_temperature = 0.5 + torch.rand(ROWS, generator=generator)
    inv_temperature[::4] = 0
    return logits, inv_temperature, torch.rand(ROWS, generator=generator)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_rank_gets_the_token_of_the_plain_distribution(ranks: int) -> None:
    logits, inv_temperature, uniforms = case()

    tokens = sampled(logits, inv_temperature, uniforms, ranks)

    assert all(torch.equal(other, tokens[0]) for other in tokens)
    shares = torch.softmax(logits.double() * inv_temperature.double().unsqueeze(1), -1)
    until = shares.cumsum(-1)
    drawn = (until <= uniforms.double().unsqueeze(1)).sum(-1)
    clear = (until - uniforms.double().unsqueeze(1)).abs().amin(-1) > NEAR_EDGE
    expected = torch.where(inv_temperature == 0, logits.argmax(-1), drawn)
    decided = clear | (inv_temperature == 0)
    assert decided.sum() > ROWS * 0.8
    assert torch.equal(tokens[0][decided], expected[decided])


@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_the_ends_of_the_distribution_are_tokens_that_have_a_share(uniform: float) -> None:
    logits = torch.full((2, VOCAB), -200.0)
    logits[:, 10], logits[:, 4000] = 1.0, 1.0

    tokens = sampled(logits, torch.ones(2), torch.full((2,), uniform), 3)[0]

    assert tokens.tolist() == [10 if uniform == 0 else 4000] * 2


def test_equal_logits_give_the_first_on_any_number_of_ranks() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 2600:] = 1.0

    for ranks in (1, 2, 5):
        assert sampled(logits, torch.zeros(3), torch.zeros(3), ranks)[0].tolist() == [0, 2600, 0]


def test_rows_do_not_see_each_other() -> None:
    logits, inv_temperature, uniforms = case()

    together = sampled(logits, inv_temperature, uniforms, 2)[0]

    alone = [sampled(logits[i : i + 1], inv_temperature[i : i + 1], uniforms[i : i + 1], 2)[0] for i in range(0, 64, 9)]
    assert torch.equal(torch.cat(alone), together[::9])


def test_broken_logits_give_a_token_of_the_vocabulary_and_harm_no_other_row() -> None:
    logits, inv_temperature, uniforms = case()
    clean = sampled(logits, inv_temperature, uniforms, 2)[0]
    broken = logits.clone()
    broken[3, 7], broken[4, 8], broken[5] = float("nan"), float("inf"), float("-inf")

    tokens = sampled(broken, inv_temperature, uniforms, 2)[0]

    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    others = [row for row in range(ROWS) if row not in (3, 4, 5)]
    assert torch.equal(tokens[others], clean[others])


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, inv_temperature, uniforms = case()
    rounded = logits.to(torch.bfloat16)

    tokens = sampled(rounded, inv_temperature, uniforms, 2)[0]

    assert torch.equal(tokens, sampled(rounded.float(), inv_temperature, uniforms, 2)[0])
