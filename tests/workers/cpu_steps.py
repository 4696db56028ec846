"""Small models on the CPU's own kernels, and steps for them over caches of random keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.loader import dummy_weights
from nanovllm_dist.models.parallel import Communicator, SingleRank
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
from nanovllm_dist.workers.platform.cpu_layers import CpuLayers, cpu_layers

BF16, CPU = torch.bfloat16, torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {**SHAPE, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**SHAPE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
    "one_kv_head": {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1},
}
BLOCK_SIZE = 16


def native(head_dim: int = 64, int8: bool = False) -> CpuLayers:
    layers = cpu_layers(CpuAttention(head_dim, BF16), BF16, int8)
    assert isinstance(layers, CpuLayers), "this machine has a C compiler, and the kernels were not built with it"
    return layers


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def make_model(
    name: str, directory: Path, kernels: LayerKernels, dtype: torch.dtype = BF16, comm: Communicator | None = None
) -> DecoderLM:
    """This rank's shard of one of MODELS with random weights, which in float32 are those of bfloat16."""
    (directory / "config.json").write_text(json.dumps(MODELS[name]))
    model = build_model(read_model_config(directory), comm or SingleRank(), kernels, dtype, CPU)
    dummy_weights(model, 3)
    if dtype == torch.float32:  # what the others have
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BF16))
    model.finalize()
    return model


def decodes(model: DecoderLM, lengths: list[int], dtype: torch.dtype = BF16) -> AttentionBatch:
    """One token for each row, at the end of a context whose keys and values are random."""
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = (torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(5)) + 1).tolist()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    last = torch.tensor(lengths) - 1
    slots = tables[torch.arange(len(lengths)), last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE
    shape = (sum(blocks) + 1, BLOCK_SIZE, model.kv_heads, model.head_dim)
    caches = [tuple(random(*shape, seed=2 * layer + part).to(dtype) for part in (0, 1)) for layer in range(3)]
    return AttentionBatch(
        slot_mapping=slots,
        block_tables=tables,
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        query_start=torch.arange(len(lengths) + 1, dtype=torch.int32),
        num_decodes=len(lengths),
        host_query_lens=[1] * len(lengths),
        host_context_lens=lengths,
        kv_caches=[(keys, values) for keys, values in caches],
    )


def run(model: DecoderLM, batch: AttentionBatch) -> torch.Tensor:
    ids = torch.arange(len(batch.host_context_lens)) + 7
    with torch.inference_mode():
        return model(ids, (batch.context_lens - 1).long(), batch)


def mixed(model: DecoderLM, prefills: list[tuple[int, int]], lengths: list[int]) -> AttentionBatch:
    """Decodes of these lengths, then prefill rows of (tokens, keys before them)."""
    batch = decodes(model, [*lengths, *(new + old for new, old in prefills)])
    counts = [*(1 for _ in lengths), *(new for new, _old in prefills)]
    slots = []
    for row, (count, length) in enumerate(zip(counts, batch.host_context_lens, strict=True)):
        places = torch.arange(length - count, length)
        slots.append(batch.block_tables[row, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE)
    batch.slot_mapping = torch.cat(slots)
    batch.query_start = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    batch.num_decodes, batch.host_query_lens = len(lengths), counts
    return batch


def run_mixed(model: DecoderLM, batch: AttentionBatch) -> torch.Tensor:
    rows = zip(batch.host_query_lens, batch.host_context_lens, strict=True)
    positions = torch.cat([torch.arange(length - count, length) for count, length in rows])
    with torch.inference_mode():
        return model(torch.arange(len(positions)) % 250, positions, batch)
