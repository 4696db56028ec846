"""The C kernels for rows in bfloat16 give what exact attention gives, to the rounding of bfloat16."""

from __future__ import annotations

import platform
import random
from pathlib import Path

import pytest
import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.workers.platform import cpu_kernels
from nanovllm_dist.workers.platform.cpu_attention import HEAD_DIMS, CpuAttention

BF16 = torch.bfloat16
# (tokens, keys before them) of each prefill row
ROWS = [(1, 0), (2, 0), (5, 59), (64, 0), (65, 64), (97, 3), (2, 300), (131, 130)]


def make_batch(
    decodes: list[int], prefills: list[tuple[int, int]], block_size: int, kv_heads: int, dim: int
) -> AttentionBatch:
    """Rows of these lengths over blocks in a random order; what no row may see holds NaN."""
    contexts, counts = [*decodes, *(a + b for a, b in prefills)], [*(1 for _ in decodes), *(a for a, _b in prefills)]
    blocks = [-(-length // block_size) for length in contexts]
    order = list(range(1, sum(blocks) + 1))
    random.Random(7).shuffle(order)
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    keys, values = (torch.full((sum(blocks) + 1, block_size, kv_heads, dim), torch.nan, dtype=BF16) for _ in range(2))
    generator, slots = torch.Generator().manual_seed(dim), []
    for row, (count, length) in enumerate(zip(counts, contexts, strict=True)):
        own = torch.tensor([order.pop() for _ in range(blocks[row])])
        tables[row, : len(own)] = own
        places = own.repeat_interleave(block_size)[:length] * block_size + torch.arange(length) % block_size
        for cache in (keys, values):
            content = torch.randn(length, kv_heads, dim, generator=generator) * 2
            cache.flatten(0, 1)[places] = content.to(BF16)
        slots.append(places[length - count :])
    return AttentionBatch(
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        num_decodes=len(decodes),
        host_query_lens=counts,
        host_context_lens=contexts,
        kv_caches=[(keys, values)],
    )


def exact(query: torch.Tensor, batch: AttentionBatch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention of a row in float64 [tokens, heads, dim], the largest value that each of its heads could see)."""
    keys, values = batch.kv_caches[0]
    block_size, kv_heads = keys.shape[1:3]
    length, count = batch.host_context_lens[row], batch.host_query_lens[row]
    blocks = batch.block_tables[row, : -(-length // block_size)].long()
    key, value = (cache[blocks].flatten(0, 1)[:length].double() for cache in (keys, values))
    own = query[int(batch.query_start[row]) :][:count].double()
    group = query.shape[1] // kv_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", own, key) / query.shape[-1] ** 0.5
    hidden = torch.arange(length) > torch.arange(length - count, length).unsqueeze(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value), torch.einsum("hqk,khd->qhd", weights, value.abs())


def check(attention: CpuAttention, dim: int, kv_heads: int, group: int, block_size: int) -> None:
    """Decodes and prefills of one step against attention in float64."""
    assert not attention.plans_prefills(), "this machine has a C compiler, and the kernel was not built with it"
    batch = make_batch([70, 3, 1, 64, 129], ROWS, block_size, kv_heads, dim)
    tokens = len(batch.slot_mapping)
    query = torch.randn(tokens, kv_heads * group, dim, generator=torch.Generator().manual_seed(1)).to(BF16)
    key, value = (cache.flatten(0, 1)[batch.slot_mapping] for cache in batch.kv_caches[0])
    output = attention.attend(query, key, value, 0, batch, attention.prepare(batch)).double()
    for row in range(len(batch.host_query_lens)):
        expected, bound = exact(query, batch, row)
        ours = output[int(batch.query_start[row]) :][: len(expected)]
        # a weight and the result are rounded once each, by at most 2**-8 of themselves; sums in fp32 add little
        assert ((ours - expected).abs() <= 2**-7 * bound + 1e-6).all(), row


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (1, 7), (2, 1), (1, 32), (1, 120)])
@pytest.mark.parametrize("block_size", [5, 16, 128])
def test_every_row_is_exact_to_the_rounding_of_bfloat16(dim: int, kv_heads: int, group: int, block_size: int) -> None:
    check(CpuAttention(dim, BF16), dim, kv_heads, group, block_size)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_processor_that_does_not_multiply_bfloat16_gets_the_same(
    dim: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the compiler's option is one for x86")
    monkeypatch.setenv("CC", "gcc -mno-avx512bf16")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    cpu_kernels.kernel_library.cache_clear()
    try:
        attention = CpuAttention(dim, BF16)
    finally:
        cpu_kernels.kernel_library.cache_clear()
    check(attention, dim, 2, 3, 16)


def test_large_scores_do_not_overflow_and_the_likeliest_key_wins() -> None:
    attention = CpuAttention(64, BF16)
    batch = make_batch([], [(100, 0)], 16, 1, 64)
    keys, values = batch.kv_caches[0]
    keys.flatten(0, 1)[batch.slot_mapping] = torch.linspace(1, 100, 100).to(BF16).view(-1, 1, 1).expand(-1, 1, 64)
    query = torch.full((100, 1, 64), 100.0, dtype=BF16)
    key, value = (cache.flatten(0, 1)[batch.slot_mapping] for cache in (keys, values))
    output = attention.attend(query, key, value, 0, batch, attention.prepare(batch))
    assert torch.equal(output, value)  # every token's own key is the largest it sees


def test_float32_prefills_are_left_to_torch() -> None:
    assert CpuAttention(64, torch.float32).plans_prefills()
    assert CpuAttention(48, BF16).plans_prefills()
