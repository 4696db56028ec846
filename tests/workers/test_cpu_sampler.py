"""The CPU's own sampler picks what exact integer sums say, and agrees with the sampler that torch runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanovllm_dist.models.layers.embedding import LMHead, VocabWeight
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library
from nanovllm_dist.workers.platform.cpu_sampler import CpuSampler
from nanovllm_dist.workers.sampling_blocks import block_max
from nanovllm_dist.workers.sampling_draw import DrawOptions, draw

BF16 = torch.bfloat16


def sampler(vocab: int) -> CpuSampler:
    library = kernel_library()
    assert library is not None, "this machine has a C compiler, and the kernels were not built with it"
    comm = SingleRank()
    head = LMHead(VocabWeight("lm_head.weight", vocab, 2, comm, BF16, torch.device("cpu")), False, comm)
    return CpuSampler(library, head, comm)


def logits_of(rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale).to(BF16)


def sample(logits: torch.Tensor, temperature: float, uniforms: list[float]) -> list[int]:
    scale = torch.full((len(logits),), 1 / temperature if temperature else 0.0)
    chosen: list[int] = sampler(logits.shape[1]).sample(logits, scale, torch.tensor(uniforms).double()).tolist()
    return chosen


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 49152])
def test_without_temperature_the_first_of_the_largest_is_taken(vocab: int) -> None:
    logits = logits_of(5, vocab).round()  # many ties
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, 0.0, [0.5] * 5) == expected


@pytest.mark.parametrize("temperature", [0.2, 0.6, 1.7])
@pytest.mark.parametrize("vocab", [3, 300, 49152])
def test_draws_are_those_of_the_sampler_in_torch_but_for_rounding(vocab: int, temperature: float) -> None:
    rows = 200
    logits = logits_of(rows, vocab)
    uniforms = np.random.default_rng(1).random(rows)
    wide = logits.float()
    off = np.zeros(rows)
    options = DrawOptions(
        np.full(rows, temperature, np.float32), off.astype(np.int64), off + 1, off.astype(np.float32), uniforms
    )
    expected = draw(wide.clone(), block_max(wide), options).tolist()
    ours = sample(logits, temperature, uniforms.tolist())
    # the exponentials of two libraries round apart, which moves a border by 2**-22 or so of the whole
    assert sum(a != b for a, b in zip(ours, expected, strict=True)) <= 1


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]], dtype=BF16).expand(4000, 4)
    uniforms = (np.arange(4000) + 0.5) / 4000
    counts = np.bincount(sample(logits, 1.0, uniforms.tolist()), minlength=4) / 4000
    expected = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).softmax(0).numpy()
    assert np.abs(counts - expected).max() < 1e-3


def test_a_row_depends_on_itself_alone() -> None:
    logits = logits_of(9, 1000)
    uniforms = [(i + 0.5) / 9 for i in range(9)]
    together = sample(logits, 0.8, uniforms)
    assert together == [sample(logits[i : i + 1], 0.8, uniforms[i : i + 1])[0] for i in range(9)]


def test_the_ends_of_the_interval_give_tokens_that_can_be_drawn() -> None:
    logits = torch.full((2, 700), -torch.inf, dtype=BF16)
    logits[:, 300:303] = 1.0
    assert sample(logits, 1.0, [0.0, float(np.nextafter(1.0, 0.0))]) == [300, 302]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution_give_the_token_that_the_sampler_in_torch_gives(temperature: float) -> None:
    logits = torch.zeros(4, 600, dtype=BF16)
    logits[0, 400], logits[1, 500], logits[1, 550] = torch.nan, torch.inf, torch.nan
    logits[2] = -torch.inf
    logits[3, 5] = 100.0
    assert sample(logits, temperature, [0.3] * 4) == [400, 500, 0, 5]


def test_padding_behind_the_vocabulary_is_never_drawn() -> None:
    logits = torch.zeros(50, 40, dtype=BF16)
    logits[:, 33:] = 100.0
    uniforms = torch.linspace(0, 0.999, 50).double()
    assert sampler(33).sample(logits, torch.ones(50), uniforms).max() < 33
