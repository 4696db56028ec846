"""What a device may do its own way inside a layer, as one interface, and how torch alone does it.

`TorchLayers` is the reference for every other implementation. Weights and their cutting are not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nanovllm_dist.models.layers.activation import silu_and_mul
from nanovllm_dist.models.layers.attention_batch import AttentionBackend, AttentionBatch
from nanovllm_dist.models.layers.linear_kernel import LinearKernel, pack_linear
from nanovllm_dist.models.layers.norm import QueryKeyNorm, add_rms_norm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding, Rotation, rotate


class LayerKernels(Protocol):
    """The operations between the matrix products of a decoder layer."""

    def prepare(self, batch: AttentionBatch, positions: torch.Tensor, rotary: RotaryEmbedding) -> Any:
        """Whatever all layers of this step share; called once per step. positions [T] int64."""
        ...

    def attend(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: QueryKeyNorm | None,
        layer: int,
        batch: AttentionBatch,
        plan: Any,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, store keys and values in the cache of `layer`, attend.

        qkv [T, (num_heads + 2 * num_kv_heads) * head_dim], `plan` from `prepare` -> [T, num_heads * head_dim].
        """
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, size] -> (norm(x + residual) * weight, x + residual); may write to `residual`."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * size], gates first -> silu(gates) * rest, [T, size]."""
        ...

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """A kernel over weight [out, in] in a layout of its own, or None where torch's linear is to be used."""
        ...


@dataclass(frozen=True)
class TorchPlan:
    """What `TorchLayers.prepare` makes of a step: the rotation of its tokens, and the attention backend's own plan."""

    rotation: Rotation
    attention: Any


class TorchLayers:
    """LayerKernels from torch's operators around an attention backend."""

    def __init__(self, attention: AttentionBackend) -> None:
        self._attention = attention

    def prepare(self, batch: AttentionBatch, positions: torch.Tensor, rotary: RotaryEmbedding) -> TorchPlan:
        """The rotation of each token, and the backend's own plan."""
        return TorchPlan(rotary(positions), self._attention.prepare(batch))

    def attend(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: QueryKeyNorm | None,
        layer: int,
        batch: AttentionBatch,
        plan: TorchPlan,
    ) -> torch.Tensor:
        """See LayerKernels."""
        heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
        query_key, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
        if qk_norm is not None:
            query_key = qk_norm(query_key)
        query_key = rotate(query_key, plan.rotation)
        query, key = query_key[:, :num_heads], query_key[:, num_heads:]
        return self._attention.attend(query, key, value, layer, batch, plan.attention).flatten(1)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerKernels."""
        return add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See LayerKernels."""
        return silu_and_mul(gate_up)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """See LayerKernels."""
        return pack_linear(weight, bias)
