"""RMSNorm over hidden states and over heads: statistics in fp32, cast back before the weight is applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from nanovllm_dist.models.layers.shard import Shard, empty_parameter

if TYPE_CHECKING:
    from nanovllm_dist.models.layers.kernels import LayerKernels


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] divided by the root mean square of its last dimension; computed in fp32, returned in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, size] -> (norm(x + residual) * weight, x + residual)."""
    total = x if residual is None else x + residual
    return rms_normalize(total, eps) * weight, total


class RMSNorm(nn.Module):
    """Weight of a norm that may add a residual first."""

    def __init__(
        self, name: str, size: int, eps: float, kernels: LayerKernels, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._name = name
        self.eps = eps
        self._kernels = kernels
        self.weight = empty_parameter(size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, size] -> (norm(x + residual), x + residual); `residual` may be written to."""
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def shards(self) -> Iterator[Shard]:
        """The weight, whole on every rank."""
        yield Shard.whole(self._name, self.weight, tuple(self.weight.shape), dummy="ones")


class QueryKeyNorm(nn.Module):
    """RMSNorm of each query head and each key head, both in one go over heads that lie side by side.

    Attributes:
        weight: [num_heads + num_kv_heads, head_dim], one row for each head, all query heads' equal, all key heads'.
        query_weight, key_weight: [head_dim], the same memory, for kernels that take one weight for all heads.
    """

    def __init__(
        self,
        prefix: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._prefix = prefix
        self._num_heads = num_heads
        self.eps = eps
        self.weight = empty_parameter(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)
        self.query_weight = nn.Parameter(self.weight.detach()[0], requires_grad=False)
        self.key_weight = nn.Parameter(self.weight.detach()[num_heads], requires_grad=False)

    def forward(self, query_key: torch.Tensor) -> torch.Tensor:
        """[T, num_heads + num_kv_heads, head_dim] -> the same shape."""
        return rms_normalize(query_key, self.eps) * self.weight

    def shards(self) -> Iterator[Shard]:
        """One weight for all query heads and one for all key heads, repeated per head here."""
        shape = (self.weight.shape[-1],)
        yield Shard.whole(f"{self._prefix}.q_norm.weight", self.weight[: self._num_heads], shape, dummy="ones")
        yield Shard.whole(f"{self._prefix}.k_norm.weight", self.weight[self._num_heads :], shape, dummy="ones")
