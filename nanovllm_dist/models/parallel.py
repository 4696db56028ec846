"""The collective operations that sharded layers need, behind one small interface passed to them explicitly.

Layers do not know process groups or devices; a platform may hand them a faster implementation.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist


class Communicator(Protocol):
    """One rank of a tensor-parallel group."""

    rank: int
    world_size: int

    def reduce_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where the next `all_reduce` of this shape likes to find its part, or None if anywhere will do."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, every rank gets it; may work in place."""
        ...

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Tensors of equal shape from every rank, in rank order, on rank 0; None elsewhere."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Tensors of equal shape [...] from every rank, in rank order, on every rank: [world_size, ...]."""
        ...

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's content, written into `tensor` on every other rank."""
        ...


class SingleRank:
    """The group of one: nothing to communicate."""

    rank = 0
    world_size = 1

    def reduce_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Anywhere."""
        return None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Identity."""
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The tensor itself."""
        return [tensor]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, with a dimension in front."""
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Identity."""
        return tensor


class GroupCommunicator:
    """Collectives of torch.distributed's default process group, which must be initialised."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def reduce_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Anywhere."""
        return None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over ranks."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Gather equal shapes to rank 0."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(tensor, parts, dst=0)
        return parts

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather equal shapes everywhere."""
        rows, rest = len(tensor), tensor.shape[1:]
        # side by side, not stacked: a compiler that traces this knows no other form of the result
        parts = torch.empty(self.world_size * rows, *rest, dtype=tensor.dtype, device=tensor.device)
        dist.all_gather_into_tensor(parts, tensor.contiguous())
        return parts.view(self.world_size, rows, *rest)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's content, in place."""
        dist.broadcast(tensor, src=0)
        return tensor
