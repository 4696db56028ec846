"""Decode steps as device graphs: one per batch size, from embedding to sampled token, recorded when first needed.

A step of R rows runs in the smallest size that holds it; the rest is padding. Sizes come up in the same order on
every rank, because all ranks run the same steps. What a device's graph is, and what a step computes, is unknown here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nanovllm_dist.workers.transfers import Array, Transfers, packed_size, views

# Replays a recorded run of work on the device
Replay = Callable[[], None]
_SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
_STEP = 64


@dataclass(frozen=True)
class DecodeInputs:
    """`size` rows on the device, each [size]: int64 `slots`, `positions`, `cache_slots`; int32 `context_lens`;
    float32 `inv_temperature` (0: greedy); float64 `uniforms`."""

    slots: torch.Tensor
    positions: torch.Tensor
    cache_slots: torch.Tensor
    context_lens: torch.Tensor
    inv_temperature: torch.Tensor
    uniforms: torch.Tensor


@dataclass(frozen=True)
class DecodeOutputs:
    """int64 `tokens` [size], and `logits` [size, columns] of this rank; overwritten by the next run of any size."""

    tokens: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class _Recorded:
    packed: torch.Tensor
    outputs: DecodeOutputs
    replay: Replay


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Small sizes close together, then every 64th, and always `max_num_seqs` itself."""
    sizes = [*_SMALL_SIZES, *range(_SMALL_SIZES[-1] + _STEP, max_num_seqs, _STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Runs decode steps by replay.

    Args:
        decode: the step on the device, without waiting for it or depending on the data's values.
        record: the platform's recorder: runs the function once while recording it, and returns what replays it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        decode: Callable[[DecodeInputs], DecodeOutputs],
        record: Callable[[Callable[[], None]], Replay],
        transfers: Transfers,
        device: torch.device,
    ) -> None:
        self._sizes = sorted(sizes)
        self._decode = decode
        self._record = record
        self._transfers = transfers
        self._device = device
        self._recorded: dict[int, _Recorded] = {}

    def size_of(self, num_rows: int) -> int:
        """The smallest size that holds `num_rows`, at most the largest size."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def run(self, arrays: Sequence[Array]) -> DecodeOutputs:
        """One step; `arrays` are the fields of DecodeInputs on the host, each of one of the sizes."""
        size = len(arrays[0])
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._new(arrays)
        self._transfers.upload(arrays, into=recorded.packed)
        recorded.replay()
        return recorded.outputs

    def _new(self, arrays: Sequence[Array]) -> _Recorded:
        # recording does not run anything, and a step has effects (cache, counters): the first run is a replay too
        packed = torch.zeros(packed_size(arrays), dtype=torch.uint8, device=self._device)
        inputs = DecodeInputs(*views(packed, arrays))
        outputs: list[DecodeOutputs] = []
        replay = self._record(lambda: outputs.append(self._decode(inputs)))
        return _Recorded(packed, outputs[-1], replay)
