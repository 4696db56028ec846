"""Compiles the kernels of a model side by side, in threads, while its weights are being loaded.

One after the other, as the first steps meet them, eleven kernels take nine seconds on an empty cache. Each is called
once on a few rows of nothing, with the types and sizes that real steps have. What they compute is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.workers.kernels.paged_decode import ROW_LIMITS
from nanovllm_dist.workers.platform.cuda_sampler import ShardedSampler

_ROWS = 16
# Sizes of decode graphs that may have linear kernels of their own
_FEW_ROWS = (1, 2, 4)


def compile_in_threads(
    config: EngineConfig, model_config: ModelConfig, model: DecoderLM, kernels: LayerKernels, sampler: ShardedSampler
) -> Callable[[], None]:
    """Start compiling what steps of this model need; returns what waits for the end of it, and raises what failed."""
    device = torch.device("cuda", torch.cuda.current_device())
    calls = _calls(config, model_config, model, kernels, sampler, device)
    pool = ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1), thread_name_prefix="compile")

    def run(call: Callable[[], object]) -> None:
        torch.cuda.set_device(device)  # each thread has its own
        with torch.inference_mode():
            call()

    futures: list[Future[None]] = [pool.submit(run, call) for call in calls]

    def wait() -> None:
        try:
            for future in futures:
                future.result()
        except OutOfResources as error:
            raise ConfigError(
                f"head_dim={model_config.head_dim} of the model: a kernel needs more than this GPU has ({error}); "
                "use a larger one, or device=cpu"
            ) from error
        finally:
            pool.shutdown()

    return wait


def _calls(
    config: EngineConfig,
    model_config: ModelConfig,
    model: DecoderLM,
    kernels: LayerKernels,
    sampler: ShardedSampler,
    device: torch.device,
) -> list[Callable[[], object]]:
    dtype = model.norm.weight.dtype
    layer = model.layers[0]
    hidden = torch.zeros(_ROWS, model_config.hidden_size, dtype=dtype, device=device)

    def attend(decodes: int, prefills: int) -> None:
        tokens = decodes + 2 * prefills
        qkv = torch.zeros(tokens, layer.attention.qkv_proj.out_features, dtype=dtype, device=device)
        batch = _batch(config, model, decodes, prefills, dtype, device)
        plan = kernels.prepare(batch, torch.zeros(tokens, dtype=torch.int64, device=device), model.rotary)
        attention = layer.attention
        kernels.attend(qkv, attention.num_heads, attention.num_kv_heads, attention.qk_norm, 0, batch, plan)

    decodes = (1, *(limit + 1 for limit in ROW_LIMITS))
    # kept here: when they are loaded, the layers hand their weights over to kernels
    linears = (layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    weights = [(linear.weight, linear.bias) for linear in linears if linear.weight is not None]
    weights.append((model.output_vocab.weight, None))

    def project(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> None:
        kernel = kernels.pack_linear(weight, bias)
        if kernel is not None:
            kernel(torch.zeros(rows, weight.shape[1], dtype=dtype, device=device))

    return [
        lambda: kernels.add_rms_norm(hidden.clone(), None, model.norm.weight, model_config.rms_norm_eps),
        lambda: kernels.add_rms_norm(hidden.clone(), hidden.clone(), model.norm.weight, model_config.rms_norm_eps),
        lambda: kernels.silu_mul(hidden.new_zeros(_ROWS, layer.mlp.gate_up_proj.out_features)),
        *(partial(attend, rows, 0) for rows in decodes if rows <= config.max_num_seqs),
        *(partial(project, *weight, rows) for weight in weights for rows in _FEW_ROWS),
        lambda: attend(0, 1),
        lambda: sampler.rehearse(torch.zeros(_ROWS, model.lm_head.columns, dtype=dtype, device=device)),
    ]


def _batch(
    config: EngineConfig, model: DecoderLM, decodes: int, prefills: int, dtype: torch.dtype, device: torch.device
) -> AttentionBatch:
    """Rows of one or two tokens on a cache of the null block alone."""
    rows, tokens = decodes + prefills, decodes + 2 * prefills
    lengths = [1] * decodes + [2] * prefills
    cache = torch.zeros(1, model.kv_heads, config.block_size, model.head_dim, dtype=dtype, device=device)
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).to(torch.int32)
    blocks = -(-config.max_model_len // config.block_size) + 1
    return AttentionBatch(
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_tables=torch.zeros(rows, blocks, dtype=torch.int32, device=device),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_start=starts,
        num_decodes=decodes,
        host_query_lens=lengths,
        host_context_lens=lengths,
        kv_caches=[(cache.transpose(1, 2), cache.clone().transpose(1, 2))],
    )
