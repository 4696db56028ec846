"""Shard: one checkpoint tensor, and where this rank's part of it goes. How files are read is the loader's business."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class Shard:
    """Fill `target` with elements [start, end) along `dim` of the checkpoint tensor `name`.

    `shape` is the whole tensor's. `target` is a view of a parameter; the slice must broadcast to it.
    `dummy` is what the tensor holds when a model runs without a checkpoint.
    """

    name: str
    target: torch.Tensor
    shape: tuple[int, ...]
    dim: int
    start: int
    end: int
    dummy: Literal["normal", "ones"] = "normal"

    @classmethod
    def whole(
        cls, name: str, target: torch.Tensor, shape: tuple[int, ...], dummy: Literal["normal", "ones"] = "normal"
    ) -> Shard:
        """A tensor that every rank holds whole."""
        return cls(name, target, shape, 0, 0, shape[0], dummy)


class Loadable(Protocol):
    """What the loader needs of a model."""

    unused_tensors: tuple[str, ...]  # patterns (fnmatch) of checkpoint names that this model does without

    def shards(self) -> Iterator[Shard]:
        """Every checkpoint tensor that the model needs, with the place for this rank's part."""
        ...


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """A parameter for inference whose memory is not initialised: only loading fills it."""
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
