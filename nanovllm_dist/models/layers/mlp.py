"""The gated MLP: down(silu(gate(x)) * up(x)), cut over ranks by intermediate features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.layers.linear import RowParallelLinear, gate_up_linear, intermediate_range
from nanovllm_dist.models.layers.shard import Shard
from nanovllm_dist.models.parallel import Communicator


class MLP(nn.Module):
    """x [T, hidden] -> [T, hidden], equal on all ranks."""

    def __init__(
        self,
        prefix: str,
        config: ModelConfig,
        comm: Communicator,
        kernels: LayerKernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._kernels = kernels
        start, end = intermediate_range(config, comm)
        self.gate_up_proj = gate_up_linear(prefix, config, comm, dtype, device)
        self.down_proj = RowParallelLinear(
            f"{prefix}.down_proj",
            config.intermediate_size,
            start,
            end,
            config.hidden_size,
            config.mlp_bias,
            comm,
            dtype,
            device,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        output: torch.Tensor = self.down_proj(self._kernels.silu_mul(self.gate_up_proj(x)))
        return output

    def shards(self) -> Iterator[Shard]:
        """Tensors of the three projections."""
        yield from self.gate_up_proj.shards()
        yield from self.down_proj.shards()
