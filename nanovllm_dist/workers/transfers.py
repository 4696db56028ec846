"""How a step's numbers reach the device, and how its tokens come back, behind one interface.

A step has a few uploads and one download. None waits for the device where the device can run ahead of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.generic]

# Kernels are compiled for pointers that are multiples of 16, or once more for others
_ALIGNMENT = 16


class HostCopy(Protocol):
    """Tokens on their way to the host."""

    def done(self) -> bool:
        """Whether they have arrived; does not wait."""
        ...

    def tokens(self) -> list[int]:
        """The tokens; waits for them."""
        ...


class Transfers(Protocol):
    """Of one device, used by one thread."""

    def upload(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Device tensors of the same contents, shapes and dtypes, valid in the order of the device's work."""
        ...

    def upload_into(self, packed: torch.Tensor, arrays: Sequence[Array]) -> None:
        """Write them to `packed`, a uint8 tensor on the device of `packed_size(arrays)` bytes: see `views`."""
        ...

    def download(self, tokens: torch.Tensor) -> HostCopy:
        """Start copying `tokens` [N] to the host."""
        ...


def offsets(arrays: Sequence[Array]) -> list[int]:
    """Where each array begins when they are packed into bytes, and the end as the last entry."""
    places = [0]
    for array in arrays:
        places.append(places[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return places


def packed_size(arrays: Sequence[Array]) -> int:
    """Bytes that the arrays take when packed."""
    return offsets(arrays)[-1]


def views(packed: torch.Tensor, arrays: Sequence[Array]) -> list[torch.Tensor]:
    """Typed tensors over `packed`, a uint8 tensor that holds arrays like these."""
    typed = []
    for start, array in zip(offsets(arrays), arrays, strict=False):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        typed.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
    return typed


class _Arrived:
    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def done(self) -> bool:
        return True

    def tokens(self) -> list[int]:
        return self._tokens


class DirectTransfers:
    """For a device that works on the host's own memory."""

    def upload(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """The arrays themselves."""
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]

    def upload_into(self, packed: torch.Tensor, arrays: Sequence[Array]) -> None:
        """A copy."""
        target = packed.numpy()
        for start, array in zip(offsets(arrays), arrays, strict=False):
            target[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def download(self, tokens: torch.Tensor) -> HostCopy:
        """They are there."""
        return _Arrived(tokens.tolist())
