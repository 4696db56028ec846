"""A model's layers with their norms deferred against the same layers with norms of their own, and against fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import CONFIGS, make_checkpoint, random_tokens

pytest.importorskip("triton")

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.loader import load_weights
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.workers.platform import get_platform
from nanovllm_dist.workers.platform.cuda_decoder import DeferredNorms, can_defer_norms
from nanovllm_dist.workers.platform.cuda_layers import TritonLayers

BLOCK = 16
# Rows of prompts, then as many decodes: few for the kernel of few rows, some, and many
LENGTHS = [[1], [40, 7, 3], [60] * 70]


def make(kind: str, directory: Path, dtype: torch.dtype) -> tuple[DecoderLM, TritonLayers]:
    make_checkpoint(CONFIGS[kind], directory)
    name = str(dtype).removeprefix("torch.")
    config, model_config = resolve_config(EngineConfig(model=str(directory), device="cuda", dtype=name), progress=False)
    platform, comm = get_platform("cuda"), SingleRank()
    device = platform.open_device(0, config)
    kernels = TritonLayers(config, model_config, comm, dtype)
    model = build_model(model_config, comm, kernels, dtype, device)
    load_weights(model, str(directory), lambda done, total: None)
    model.finalize()
    return model, kernels


@torch.inference_mode()
def run(model: DecoderLM, lengths: list[int]) -> list[torch.Tensor]:
    """Logits [rows, vocabulary] of a step that prefills rows of these lengths, and of a decode after it."""
    device, rows = torch.device("cuda"), len(lengths)
    per_row = -(-(max(lengths) + 1) // BLOCK)
    shape = (rows * per_row + 1, model.kv_heads, BLOCK, model.head_dim)
    caches = [
        tuple(torch.zeros(shape, dtype=model.norm.weight.dtype, device=device).transpose(1, 2) for _ in range(2))
        for _ in range(model.num_layers)
    ]
    tables = torch.arange(1, rows * per_row + 1, dtype=torch.int32, device=device).view(rows, per_row)
    logits = []
    for counts, computed in ((lengths, [0] * rows), ([1] * rows, lengths)):
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(computed, counts, strict=True)]).to(device)
        row_of = torch.repeat_interleave(torch.arange(rows), torch.tensor(counts)).to(device)
        decodes = rows if max(counts) == 1 else 0
        batch = AttentionBatch(
            slot_mapping=tables[row_of, positions // BLOCK].long() * BLOCK + positions % BLOCK,
            block_tables=tables,
            context_lens=torch.tensor([a + n for a, n in zip(computed, counts, strict=True)]).int().to(device),
            query_start=torch.tensor([0, *counts]).cumsum(0).int().to(device),
            num_decodes=decodes,
            host_query_lens=counts,
            host_context_lens=[],
            kv_caches=caches,  # type: ignore[arg-type]
        )
        tokens = torch.tensor(random_tokens(len(positions), seed=len(positions))).to(device)
        hidden = model(tokens, positions, batch)
        ends = torch.tensor(counts).cumsum(0) - 1
        logits.append(model.lm_head(hidden[ends.to(device)]).float())
    return logits


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_fp32_they_compute_what_the_layers_do(kind: str, lengths: list[int], tmp_path: Path) -> None:
    model, kernels = make(kind, tmp_path, torch.float32)
    before = run(model, lengths)
    model.fused = DeferredNorms(model, kernels)
    deferred = run(model, lengths)
    model.fused = None
    after = run(model, lengths)  # by the layers again, whose norms are ones now
    for theirs, *mine in zip(before, deferred, after, strict=True):
        for logits in mine:
            torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_bf16_they_are_as_near_to_fp32_as_the_layers(kind: str, tmp_path: Path) -> None:
    lengths = LENGTHS[-1]
    exact = run(make(kind, tmp_path / "fp32", torch.float32)[0], lengths)
    model, kernels = make(kind, tmp_path / "bf16", torch.bfloat16)
    plain = run(model, lengths)
    model.fused = DeferredNorms(model, kernels)
    deferred = run(model, lengths)

    def mean_error(logits: list[torch.Tensor]) -> float:
        log_probs = [part.log_softmax(-1) for part in logits]
        true = [part.log_softmax(-1) for part in exact]
        return torch.cat([a - b for a, b in zip(log_probs, true, strict=True)]).abs().mean().item()

    assert mean_error(deferred) < 1.2 * mean_error(plain)


def test_float16_and_several_ranks_keep_their_norms(tmp_path: Path) -> None:
    model, _ = make("llama", tmp_path, torch.float16)
    assert not can_defer_norms(model, world_size=1)
    model, _ = make("llama", tmp_path, torch.bfloat16)
    assert can_defer_norms(model, world_size=1)
    assert not can_defer_norms(model, world_size=2)
