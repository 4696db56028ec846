"""Kernels that start before the last has ended see all that was written, and overwrite nothing still in use.

Chains of hundreds of launches, whose results must be those of kernels that wait for each other, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from nanovllm_dist.workers.kernels import dependent_launch, sampling
from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.few_rows_linear import MAX_ROWS, few_rows_gated, few_rows_linear
from nanovllm_dist.workers.kernels.norm import add_rms_norm
from nanovllm_dist.workers.kernels.rope_cache import norm_rope_store
from nanovllm_dist.workers.kernels.sum_norm import (
    OneShotMemory,
    TwoShotMemory,
    sum_add_rms_norm_one_shot,
    sum_add_rms_norm_two_shots,
)

Chain = Callable[[], torch.Tensor]

DEVICE = "cuda"
EPS = 1e-6
LAYERS, HIDDEN, INTERMEDIATE = 200, 1024, 1536
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 64, 16
VOCAB, TOKENS = 20_000, 100


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(DEVICE)


def weights(count: int, outputs: int, inputs: int, seed: int = 0) -> list[torch.Tensor]:
    return [random(outputs, inputs, seed=seed + index) * inputs**-0.5 for index in range(count)]


def layers_with_norms(rows: int) -> Chain:
    """Layers whose intermediate tensors are freed, and their memory reused, as soon as they were read."""
    up, down = weights(5, 2 * INTERMEDIATE, HIDDEN), weights(3, HIDDEN, INTERMEDIATE, seed=9)
    norm_weight, start = random(HIDDEN), random(rows, HIDDEN)

    def run() -> torch.Tensor:
        x, residual = start.clone(), start.clone()
        for layer in range(LAYERS):
            normed, residual = add_rms_norm(x, residual, norm_weight, EPS)
            gate_up = few_rows_linear(normed, up[layer % 5])
            # Now and then a kernel that takes no part
            linear = F.linear if layer % 7 == 0 else few_rows_linear
            x = linear(silu_mul(gate_up), down[layer % 3])
        return torch.cat((x, residual))

    return run


def layers_with_deferred_norms(rows: int) -> Chain:
    """Layers over one tensor, which three kernels read for every one that writes to it."""
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    qkv, o = weights(3, width, HIDDEN), weights(3, HIDDEN, NUM_HEADS * HEAD_DIM, seed=5)
    up, down = weights(5, 2 * INTERMEDIATE, HIDDEN), weights(3, HIDDEN, INTERMEDIATE, seed=9)
    start, head_weight = random(rows, HIDDEN), random(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM)
    cos, sin = random(64, HEAD_DIM).float(), random(64, HEAD_DIM, seed=1).float()
    positions = torch.arange(rows, device=DEVICE)
    slots = positions + BLOCK_SIZE
    keys, values = (torch.zeros(2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=start.dtype, device=DEVICE) for _ in "kv")

    def run() -> torch.Tensor:
        hidden = start.clone()
        for layer in range(LAYERS):
            query = norm_rope_store(
                few_rows_linear(hidden, qkv[layer % 3]), positions, cos, sin, head_weight, EPS, NUM_HEADS, NUM_KV_HEADS,
                HEAD_DIM, slots, keys, values, None, None, hidden, EPS,
            )  # fmt: skip
            if layer % 7 == 0:
                hidden.addmm_(query.flatten(1), o[layer % 3].t())
            else:
                few_rows_linear(query.flatten(1), o[layer % 3], hidden, add=True)
            if layer % 2 == 0:
                activated = few_rows_gated(hidden, up[layer % 5], EPS)
            else:
                activated = silu_mul(few_rows_linear(hidden, up[layer % 5]), hidden, EPS)
            few_rows_linear(activated, down[layer % 3], hidden, add=True)
        return torch.cat((hidden, keys[1, :rows].flatten(1), values[1, :rows].flatten(1)), dim=1)

    return run


def layers_with_sums(rows: int) -> Chain:
    """Layers of one rank of a group of one, which finds its own rows in the memory that ranks share."""
    up, down = weights(5, 2 * INTERMEDIATE, HIDDEN), weights(3, HIDDEN, INTERMEDIATE, seed=9)
    norm_weight, start = random(HIDDEN), random(rows, HIDDEN)
    inbox = torch.full(OneShotMemory.inbox_shape(rows, 1, HIDDEN), -1, dtype=torch.int16, device=DEVICE)
    one_shot = OneShotMemory(0, (inbox,), torch.zeros(rows, dtype=torch.int32, device=DEVICE))
    part, normed_rows = torch.zeros(2, rows, HIDDEN, dtype=start.dtype, device=DEVICE)
    two_shots = TwoShotMemory(0, (part,), (normed_rows,), (torch.zeros(2, 4, dtype=torch.int32, device=DEVICE),))

    def run() -> torch.Tensor:
        normed, residual = start.clone(), start.clone()
        for layer in range(LAYERS):
            activated = few_rows_gated(normed, up[layer % 5])
            if layer % 3 == 0:
                few_rows_linear(activated, down[layer % 3], part)
                normed = sum_add_rms_norm_two_shots(rows, residual, norm_weight, EPS, two_shots)
            else:
                product = few_rows_linear(activated, down[layer % 3])
                normed = sum_add_rms_norm_one_shot(product, residual, norm_weight, EPS, one_shot)
        return torch.cat((normed, residual))

    return run


def tokens_one_after_another(rows: int) -> Chain:
    """Each token is drawn from logits that the one before makes, and read back from where it was appended."""
    embedding, [head] = random(VOCAB, HIDDEN), weights(1, VOCAB, HIDDEN, seed=1)
    inv_temperature = torch.tensor([0.0, 1.0, 2.0, 0.5], device=DEVICE)[:rows].contiguous()
    uniforms = torch.rand(TOKENS, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def run() -> torch.Tensor:
        table = torch.zeros(rows * (TOKENS + 1), dtype=torch.int32, device=DEVICE)
        for step in range(TOKENS):
            places = torch.arange(rows, device=DEVICE) * (TOKENS + 1) + step
            logits = few_rows_linear(embedding[table[places].long()], head)
            statistics = torch.empty(rows, sampling.num_chunks(VOCAB), 2, device=DEVICE)
            sampling.shard_statistics(logits, inv_temperature, statistics, vocab_local=VOCAB)
            tokens = torch.empty(rows, dtype=torch.int64, device=DEVICE)
            sampling.choose(
                statistics[None], logits, uniforms[step], inv_temperature, tokens, rank=0, vocab_start=0,
                vocab_local=VOCAB,
            )  # fmt: skip
            sampling.append_tokens(table, places, tokens)
        return table.float()

    return run


@pytest.mark.parametrize(
    "make", [layers_with_norms, layers_with_deferred_norms, layers_with_sums, tokens_one_after_another]
)
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
@torch.inference_mode()
def test_gives_the_same_bits_as_waiting_for_each_kernel(
    make: Callable[[int], Chain], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(rows)
    torch.cuda.synchronize()
    monkeypatch.setattr(dependent_launch, "ENABLED", False)
    expected = run()
    assert expected.isfinite().all()
    assert expected.unique().numel() > rows
    monkeypatch.setattr(dependent_launch, "ENABLED", True)
    for _ in range(3):
        assert torch.equal(run(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for _ in range(20):
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, expected)


def test_a_slow_kernel_before_is_waited_for() -> None:
    x, weight = random(1, HIDDEN), random(768, HIDDEN, seed=1)
    expected = few_rows_linear(x, weight)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)
    late.copy_(x)
    assert torch.equal(few_rows_linear(late, weight), expected)
