"""Linear layers cut over ranks: by output features (column-parallel) or by input features (row-parallel).

They know which part of which checkpoint tensor is theirs, and not what the features mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.layers.linear_kernel import LinearKernel
from nanovllm_dist.models.layers.shard import Shard, empty_parameter
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import HeadRange, balanced_range

# Multiples of this many intermediate features go to each rank where possible: matrix kernels like whole tiles
INTERMEDIATE_UNIT = 32


@dataclass(frozen=True)
class Piece:
    """Output features [start, end) out of `total` of the linear layer called `name` in the checkpoint."""

    name: str
    total: int
    start: int
    end: int

    @property
    def size(self) -> int:
        """Features on this rank."""
        return self.end - self.start


class PackedLinear(nn.Module):
    """x [T, in] -> [T, out] with a weight that `finalize` may repack; the base of the parallel layers."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.out_features = out_features
        self.weight = empty_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None
        self._kernel: LinearKernel | None = None

    @property
    def kernel(self) -> LinearKernel | None:
        """What `pack` made of the weight."""
        return self._kernel

    def project(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> x @ weight.T + bias; after `finalize`, `bias` is the one packed with it. `out`: where to put
        a product without bias."""
        if self._kernel is not None:
            return self._kernel(x, out)
        assert self.weight is not None
        return F.linear(x, self.weight, bias) if out is None else torch.mm(x, self.weight.t(), out=out)

    def pack(self, kernels: LayerKernels, bias: torch.Tensor | None) -> None:
        """Hand the weight to a kernel of the device's where that is faster. Call once, after loading."""
        if self.weight is None:
            return
        self._kernel = kernels.pack_linear(self.weight, bias)
        if self._kernel is not None:
            self.weight = None


class ColumnParallelLinear(PackedLinear):
    """One or more linear layers over the same input, each cut by output features, side by side in one weight.

    x [T, in], equal on all ranks -> [T, sum of the pieces' sizes], this rank's features.
    """

    def __init__(
        self, in_features: int, pieces: Sequence[Piece], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, sum(piece.size for piece in pieces), bias, dtype, device)
        self._in_features = in_features
        self._pieces = tuple(pieces)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.project(x, self.bias)

    def finalize(self, kernels: LayerKernels) -> None:
        """Repack the weight for the device; after loading."""
        self.pack(kernels, self.bias)

    def shards(self) -> Iterator[Shard]:
        """Weight and bias of every piece."""
        assert self.weight is not None
        offset = 0
        for piece in self._pieces:
            rows = slice(offset, offset + piece.size)
            shape = (piece.total, self._in_features)
            yield Shard(f"{piece.name}.weight", self.weight[rows], shape, 0, piece.start, piece.end)
            if self.bias is not None:
                yield Shard(f"{piece.name}.bias", self.bias[rows], (piece.total,), 0, piece.start, piece.end)
            offset += piece.size


class RowParallelLinear(PackedLinear):
    """A linear layer cut by input features: x [T, end - start] -> [T, out], summed over ranks, equal on all.

    Every rank holds the whole bias and adds it after the sum, so it counts once.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        start: int,
        end: int,
        out_features: int,
        bias: bool,
        comm: Communicator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(end - start, out_features, bias, dtype, device)
        self._name = name
        self._in_features = in_features
        self._start = start
        self._end = end
        self._comm = comm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        buffer = self._comm.reduce_buffer(len(x), self.out_features, x.dtype)
        output = self._comm.all_reduce(self.project(x, None, buffer))
        return output if self.bias is None else output + self.bias

    def finalize(self, kernels: LayerKernels) -> None:
        """Repack the weight for the device; after loading."""
        self.pack(kernels, None)

    def shards(self) -> Iterator[Shard]:
        """This rank's columns of the weight, and the whole bias."""
        assert self.weight is not None
        shape = (self.out_features, self._in_features)
        yield Shard(f"{self._name}.weight", self.weight, shape, 1, self._start, self._end)
        if self.bias is not None:
            yield Shard.whole(f"{self._name}.bias", self.bias, (self.out_features,))


def qkv_linear(
    prefix: str, config: ModelConfig, heads: HeadRange, dtype: torch.dtype, device: torch.device
) -> ColumnParallelLinear:
    """Queries, keys and values of this rank's heads, in that order, from one product."""
    dim = config.head_dim
    pieces = (
        Piece(f"{prefix}.q_proj", config.num_heads * dim, heads.q_start * dim, heads.q_end * dim),
        Piece(f"{prefix}.k_proj", config.num_kv_heads * dim, heads.kv_start * dim, heads.kv_end * dim),
        Piece(f"{prefix}.v_proj", config.num_kv_heads * dim, heads.kv_start * dim, heads.kv_end * dim),
    )
    return ColumnParallelLinear(config.hidden_size, pieces, config.qkv_bias, dtype, device)


def gate_up_linear(
    prefix: str, config: ModelConfig, comm: Communicator, dtype: torch.dtype, device: torch.device
) -> ColumnParallelLinear:
    """The gate and up projections of this rank's intermediate features, in that order, from one product."""
    start, end = intermediate_range(config, comm)
    pieces = [Piece(f"{prefix}.{name}", config.intermediate_size, start, end) for name in ("gate_proj", "up_proj")]
    return ColumnParallelLinear(config.hidden_size, pieces, config.mlp_bias, dtype, device)


def intermediate_range(config: ModelConfig, comm: Communicator) -> tuple[int, int]:
    """(start, end) of this rank's intermediate features."""
    return balanced_range(config.intermediate_size, comm.world_size, comm.rank, INTERMEDIATE_UNIT)
