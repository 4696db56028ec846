"""Uploads and downloads through pinned memory: the host goes on while they wait their turn on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nanovllm_dist.workers.transfers import Array, HostCopy, offsets, packed_size, views

# Enough for a step that lets 16,384 tokens of whole prompts in, with the block tables of 500 rows of 40,960 tokens
_FIRST_BYTES = 2**21
# A step makes at most this many uploads: deltas, inputs, what sampling needs, and the rows that are sampled again
_UPLOADS_PER_STEP = 4


class PinnedTransfers:
    """Transfers of the current device and stream, for `steps_in_flight` steps at a time.

    Args:
        accelerator: torch's module for the kind of device, such as `torch.cuda`, and `kind` its name.
    """

    def __init__(self, accelerator: Any, kind: str, steps_in_flight: int) -> None:
        self._device = torch.device(kind, accelerator.current_device())
        self._new_event = accelerator.Event
        self._ring = [_Pinned(self._new_event()) for _ in range(_UPLOADS_PER_STEP * (steps_in_flight + 1))]
        self._next = 0

    def upload(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """See Transfers."""
        packed = torch.empty(packed_size(arrays), dtype=torch.uint8, device=self._device)
        self.upload_into(packed, arrays)
        return views(packed, arrays)

    def upload_into(self, packed: torch.Tensor, arrays: Sequence[Array]) -> None:
        """See Transfers."""
        pinned = self._ring[self._next]
        self._next = (self._next + 1) % len(self._ring)
        places = offsets(arrays)
        staging = pinned.claim(places[-1])
        for start, array in zip(places, arrays, strict=False):
            staging[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        packed.copy_(pinned.bytes[: places[-1]], non_blocking=True)
        pinned.used()

    def download(self, tokens: torch.Tensor) -> HostCopy:
        """See Transfers."""
        return _Download(tokens, self._new_event())


class _Pinned:
    """A staging buffer that grows, and the event after which it may be written again."""

    def __init__(self, event: Any) -> None:
        self.bytes = torch.empty(_FIRST_BYTES, dtype=torch.uint8, pin_memory=True)
        self._event = event

    def claim(self, size: int) -> np.ndarray:
        """The buffer as bytes on the host, of at least `size`."""
        self._event.synchronize()
        if len(self.bytes) < size:
            self.bytes = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)
        return self.bytes.numpy()

    def used(self) -> None:
        """A copy out of it is queued."""
        self._event.record()


class _Download:
    def __init__(self, tokens: torch.Tensor, event: Any) -> None:
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._event = event
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def tokens(self) -> list[int]:
        self._event.synchronize()
        return self._host.tolist()
