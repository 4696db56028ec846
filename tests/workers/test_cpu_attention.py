"""The C kernel for decodes equals torch's operators on the same cache, and its absence changes nothing but speed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.workers.platform import cpu_kernels
from nanovllm_dist.workers.platform.cpu_attention import HEAD_DIMS, CpuAttention


def make_batch(
    lengths: list[int], prefill: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int
) -> AttentionBatch:
    """Decode rows of these context lengths and one prefill chunk, over a shuffled cache of random content."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    contexts, queries = [*lengths, prefill + 3], [1] * len(lengths) + [prefill]
    counts = [-(-length // block_size) for length in contexts]
    blocks = list(range(1, sum(counts) + 1))
    rng.shuffle(blocks)
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    slots = []
    for row, (length, query) in enumerate(zip(contexts, queries, strict=True)):
        own = [blocks.pop() for _ in range(counts[row])]
        tables[row, : len(own)] = torch.tensor(own)
        slots += [own[p // block_size] * block_size + p % block_size for p in range(length - query, length)]
    shape = (sum(counts) + 1, block_size, kv_heads, dim)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return AttentionBatch(
        slot_mapping=torch.tensor(slots),
        block_tables=tables,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        query_start=starts,
        num_decodes=len(lengths),
        host_query_lens=queries,
        host_context_lens=contexts,
        kv_caches=[(keys, values)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("kv_heads", "group", "block_size"), [(3, 3, 16), (1, 7, 32), (8, 2, 128), (2, 1, 5)])
def test_the_kernel_equals_torch(dtype: torch.dtype, dim: int, kv_heads: int, group: int, block_size: int) -> None:
    native = CpuAttention(dim, dtype)
    assert native.decodes_natively, "this machine has a C compiler, and the kernel was not built with it"
    lengths = [1, 2, block_size, block_size + 1, 300, 77]
    outputs = []
    for backend in (native, TorchAttention()):
        batch = make_batch(lengths, 9, block_size, kv_heads, dim, dtype, seed=dim + kv_heads)
        generator = torch.Generator().manual_seed(1)
        tokens, heads = len(batch.slot_mapping), kv_heads * (group + 1)
        # queries and keys are views of one tensor, as the model hands them over
        query_key = (torch.randn(tokens, heads, dim, generator=generator) * 2).to(dtype)
        value = torch.randn(tokens, kv_heads, dim, generator=generator).to(dtype)
        query, key = query_key[:, : kv_heads * group], query_key[:, kv_heads * group :]
        outputs.append(backend.attend(query, key, value, 0, batch, backend.prepare(batch)).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_large_score_does_not_overflow() -> None:
    native = CpuAttention(64, torch.float32)
    batch = make_batch([200], 2, 16, 1, 64, torch.float32, seed=0)
    query = torch.full((3, 1, 64), 100.0)
    key, value = torch.full((3, 1, 64), 100.0), torch.full((3, 1, 64), 7.0)
    output = native.attend(query, key, value, 0, batch, native.prepare(batch))
    assert torch.allclose(output[0], torch.full((1, 64), 7.0))  # the row's own key outweighs all others


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu_kernels.kernel_library.cache_clear()
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    backend = CpuAttention(64, torch.float32)
    cpu_kernels.kernel_library.cache_clear()
    assert not backend.decodes_natively
    batch = make_batch([5, 40], 4, 16, 2, 64, torch.float32, seed=3)
    query, key = torch.randn(6, 4, 64), torch.randn(6, 2, 64)
    output = backend.attend(query, key, key, 0, batch, backend.prepare(batch))
    assert output.isfinite().all()


def test_other_head_sizes_are_left_to_torch() -> None:
    assert not CpuAttention(48, torch.float32).decodes_natively
    assert not CpuAttention(64, torch.float16).decodes_natively
