"""The attention layer of a decoder: projections of this rank's heads around the device's attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.layers.linear import RowParallelLinear, qkv_linear
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.shard import Shard
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import split_heads


class Attention(nn.Module):
    """Self-attention of one decoder layer over this rank's heads."""

    def __init__(
        self,
        prefix: str,
        layer: int,
        config: ModelConfig,
        qk_norm: bool,
        comm: Communicator,
        kernels: LayerKernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        heads = split_heads(config.num_heads, config.num_kv_heads, comm.world_size, comm.rank)
        self._layer = layer
        self._kernels = kernels
        self.num_heads, self.num_kv_heads = heads.num_heads, heads.num_kv_heads
        dim = config.head_dim
        self.qkv_proj = qkv_linear(prefix, config, heads, dtype, device)
        self.o_proj = RowParallelLinear(
            f"{prefix}.o_proj",
            config.num_heads * dim,
            heads.q_start * dim,
            heads.q_end * dim,
            config.hidden_size,
            config.o_bias,
            comm,
            dtype,
            device,
        )
        self.qk_norm = (
            QueryKeyNorm(prefix, heads.num_heads, heads.num_kv_heads, dim, config.rms_norm_eps, dtype, device)
            if qk_norm
            else None
        )

    def forward(self, x: torch.Tensor, batch: AttentionBatch, plan: Any) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden], equal on all ranks. `plan` is what `LayerKernels.prepare` made."""
        qkv = self.qkv_proj(x)
        output = self._kernels.attend(qkv, self.num_heads, self.num_kv_heads, self.qk_norm, self._layer, batch, plan)
        projected: torch.Tensor = self.o_proj(output)
        return projected

    def shards(self) -> Iterator[Shard]:
        """Tensors of the projections and norms."""
        yield from self.qkv_proj.shards()
        yield from self.o_proj.shards()
        if self.qk_norm is not None:
            yield from self.qk_norm.shards()
