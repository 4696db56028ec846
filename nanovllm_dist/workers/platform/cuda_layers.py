"""The operations of a decoder layer as Triton kernels, a launch each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.linear_kernel import LinearKernel
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import split_heads
from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.norm import add_rms_norm
from nanovllm_dist.workers.kernels.paged_decode import DecodeWorkspace, config_for, decode_attention, row_limits
from nanovllm_dist.workers.kernels.paged_prefill import prefill_attention
from nanovllm_dist.workers.kernels.rope_cache import norm_rope_store
from nanovllm_dist.workers.platform.cuda_linear import CudaLinear


class Plan(NamedTuple):
    """What a step's layers share."""

    workspace: DecodeWorkspace
    positions: torch.Tensor
    cos_table: torch.Tensor
    sin_table: torch.Tensor


class TritonLayers:
    """LayerKernels of one rank; on the current device, for one stream."""

    def __init__(self, config: EngineConfig, model: ModelConfig, comm: Communicator, dtype: torch.dtype) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        heads = split_heads(model.num_heads, model.num_kv_heads, comm.world_size, comm.rank)
        self._scale = model.head_dim**-0.5
        processors = torch.cuda.get_device_properties(device).multi_processor_count

        def workspace(max_rows: int) -> DecodeWorkspace:
            return DecodeWorkspace(
                max_rows,
                heads.num_heads,
                heads.num_kv_heads,
                model.head_dim,
                config.max_model_len,
                processors,
                config_for(dtype, max_rows, heads.num_kv_heads),
                device,
            )

        sizes = {min(size, config.max_num_seqs) for size in (*row_limits(heads.num_kv_heads), config.max_num_seqs)}
        self._workspaces = {size: workspace(size) for size in sorted(sizes)}

    def prepare(self, batch: AttentionBatch, positions: torch.Tensor, rotary: RotaryEmbedding) -> Plan:
        """The work list of the decode rows."""
        workspace = next(space for size, space in self._workspaces.items() if batch.num_decodes <= size)
        if batch.num_decodes:
            workspace.prepare(batch.context_lens[: batch.num_decodes])
        return Plan(workspace, positions, rotary.cos_table, rotary.sin_table)

    def attend(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: QueryKeyNorm | None,
        layer: int,
        batch: AttentionBatch,
        plan: Plan,
        bias: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        hidden_eps: float = 0.0,
    ) -> torch.Tensor:
        """See LayerKernels. With `hidden`, qkv is a product of rows that were to be normed first, but for the norm's
        weight, still without its `bias`."""
        keys, values = batch.kv_caches[layer]
        query = norm_rope_store(
            qkv,
            plan.positions,
            plan.cos_table,
            plan.sin_table,
            None if qk_norm is None else qk_norm.weight,
            0.0 if qk_norm is None else qk_norm.eps,
            num_heads,
            num_kv_heads,
            keys.shape[-1],
            batch.slot_mapping,
            keys,
            values,
            None,
            bias,
            hidden,
            hidden_eps,
        )
        output = torch.empty_like(query)
        decodes, rows = batch.num_decodes, len(batch.context_lens)
        if decodes:
            decode_attention(
                query[:decodes],
                keys,
                values,
                batch.block_tables[:decodes],
                batch.context_lens[:decodes],
                self._scale,
                plan.workspace,
                output[:decodes],
            )
        if rows > decodes:
            prefill_attention(
                query,
                keys,
                values,
                batch.block_tables[decodes:],
                batch.context_lens[decodes:],
                batch.query_start[decodes:],
                self._scale,
                output,
            )
        return output.flatten(1)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerKernels."""
        return add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See LayerKernels."""
        return silu_mul(gate_up)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """The plain weight, with a kernel of its own for few rows."""
        return CudaLinear(weight, bias)
