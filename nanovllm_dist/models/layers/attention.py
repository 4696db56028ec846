"""What attention needs of one step, the interface of an attention implementation, and the layer around it.

How keys are found in the cache is the backend's business; which request a row belongs to is nobody's here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.linear import RowParallelLinear, qkv_linear
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.rotary import Rotation, rotate
from nanovllm_dist.models.layers.shard import Shard
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import split_heads


@dataclass
class AttentionBatch:
    """R rows of T tokens in all, and the paged cache that holds their keys and values.

    Tokens beyond the rows' own are padding: they are run, and what comes out for them means nothing.

    Attributes:
        slot_mapping: [T] int64, flat slot (block * block_size + offset) of each token's key and value. Tokens that
            must not be written, and padding, point into block 0, which is never a row's.
        block_tables: [R, max_blocks] int32, each row's blocks in order; entries beyond its context are not read.
        context_lens: [R] int32, keys visible to the row's last token, those of this step included.
        query_start: [R + 1] int32, where each row's tokens begin.
        num_decodes: the first so many rows have exactly one token each; the others are prefill chunks.
        host_query_lens: tokens of each row, on the host.
        host_context_lens: `context_lens` on the host.
        kv_caches: keys and values of each layer, [num_blocks, block_size, num_kv_heads of this rank, head_dim]. Must
            start as zeros: slots behind a row's last key are read and masked, which does not hide a NaN.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    num_decodes: int
    host_query_lens: list[int]
    host_context_lens: list[int]
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]]


class AttentionBackend(Protocol):
    """Causal attention over a paged cache, with a score scale of 1 / sqrt(head_dim)."""

    def prepare(self, batch: AttentionBatch) -> Any:
        """Whatever all layers of this step share; called once per step."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        plan: Any,
    ) -> torch.Tensor:
        """Write keys and values to the cache of `layer`, then attend.

        query [T, heads, head_dim], key and value [T, kv heads, head_dim], `plan` from `prepare` ->
        [T, heads, head_dim]. Consecutive query heads share a key/value head, in equal groups.
        """
        ...


class Attention(nn.Module):
    """Self-attention of one decoder layer over this rank's heads."""

    def __init__(
        self,
        prefix: str,
        layer: int,
        config: ModelConfig,
        qk_norm: bool,
        comm: Communicator,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        heads = split_heads(config.num_heads, config.num_kv_heads, comm.world_size, comm.rank)
        self._layer = layer
        self._backend = backend
        self._num_heads = heads.num_heads
        self._head_dim = dim = config.head_dim
        self._query_key_size = (heads.num_heads + heads.num_kv_heads) * dim
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

    def forward(self, x: torch.Tensor, rotation: Rotation, batch: AttentionBatch, plan: Any) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden], equal on all ranks."""
        qkv = self.qkv_proj(x)
        query_key = qkv[:, : self._query_key_size].unflatten(-1, (-1, self._head_dim))
        value = qkv[:, self._query_key_size :].unflatten(-1, (-1, self._head_dim))
        if self.qk_norm is not None:
            query_key = self.qk_norm(query_key)
        query_key = rotate(query_key, rotation)
        query, key = query_key[:, : self._num_heads], query_key[:, self._num_heads :]
        output = self._backend.attend(query, key, value, self._layer, batch, plan)
        projected: torch.Tensor = self.o_proj(output.flatten(1))
        return projected

    def shards(self) -> Iterator[Shard]:
        """Tensors of the projections and norms."""
        yield from self.qkv_proj.shards()
        yield from self.o_proj.shards()
        if self.qk_norm is not None:
            yield from self.qk_norm.shards()
