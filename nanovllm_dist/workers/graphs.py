"""Steps as device graphs: each shape is recorded when it first comes up, or ahead, and replayed from then on.

Shapes come up in the same order on every rank, because all ranks run the same steps. What a device's graph is, and
what a step computes, is unknown here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from nanovllm_dist.workers.batch import StepShape
from nanovllm_dist.workers.transfers import Array, Transfers, packed_size, views

T = TypeVar("T")
# (inputs on the device, context lengths on the host or none) -> whatever the step returns
StepBody = Callable[[list[torch.Tensor], list[int]], T]
# Context lengths of this step -> what the body returned, with this step's contents
Replay = Callable[[list[int]], T]
_SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_DECODE_STEP = 64
_SMALLEST_CHUNK = 64
# A step of few prefill rows has so many tokens for each, and always room for a few
_TOKENS_PER_PREFILL = 32
_FEW_PREFILLS = 8


class Recorder(Protocol):
    """A device's way to repeat steps.

    Attributes:
        records_prefills: whether steps with prefill in them can be recorded; decodes always can.
        shares_logits: whether the logits of a decode go to one place for all sizes, which a graph would else keep for
            each.
        records_ahead: whether that takes so long that every decode size is recorded before the first request.
    """

    records_prefills: bool
    shares_logits: bool
    records_ahead: bool

    def decode_sizes(self, max_num_seqs: int) -> list[int]:
        """Rows of decode graphs in rising order, the last of them `max_num_seqs`."""
        ...

    def record(self, key: Hashable, body: StepBody[T], inputs: list[torch.Tensor], lengths: list[int]) -> Replay[T]:
        """A replay of `body` that reads `inputs` at the same addresses each time.

        What a replay returns is overwritten by the next of any key. It gets as many lengths as there are here, whose
        values mean nothing.
        """
        ...


@dataclass(frozen=True)
class _Recorded:
    packed: torch.Tensor
    replay: Replay[Any]


class Graphs:
    """Recorded runs by key."""

    def __init__(self, recorder: Recorder, transfers: Transfers, device: torch.device) -> None:
        self._recorder = recorder
        self._transfers = transfers
        self._device = device
        self._recorded: dict[Hashable, _Recorded] = {}

    def run(self, key: Hashable, arrays: Sequence[Array], lengths: list[int], body: StepBody[T]) -> T:
        """`body` of the arrays on the device and the lengths: recorded the first time, replayed each time.

        For one key, arrays have the same shapes and dtypes and `body` queues the same work; it must not wait for the
        device or depend on values there, and on lengths only by handing them to operators. What it returns is
        overwritten by the next run of any key.
        """
        recorded = self._recorded.get(key)
        if recorded is None:
            packed = torch.zeros(packed_size(arrays), dtype=torch.uint8, device=self._device)
            replay = self._recorder.record(key, body, views(packed, arrays), lengths)
            recorded = self._recorded[key] = _Recorded(packed, replay)
        self._transfers.upload_into(recorded.packed, arrays)
        outputs: T = recorded.replay(lengths)
        return outputs


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Rows of decode graphs: small sizes close together, then every 64th, and always `max_num_seqs` itself."""
    sizes = [*_SMALL_SIZES, *range(_SMALL_SIZES[-1] + _DECODE_STEP, max_num_seqs, _DECODE_STEP)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def decode_size(sizes: Sequence[int], num_rows: int) -> int:
    """The smallest of the rising `sizes` that holds `num_rows`, at most the last."""
    return sizes[bisect_left(sizes, num_rows)]


def chunk_shapes(max_num_batched_tokens: int, max_num_seqs: int) -> list[StepShape]:
    """Shapes of steps with prefill in them, in rising order: numbers of tokens each at most half as large again as the
    one before, with few prefill rows and with as many as there can be, which cost programs that find nothing to do."""
    tokens, sizes = _SMALLEST_CHUNK, []
    while tokens < max_num_batched_tokens:
        sizes += [tokens, tokens + tokens // 2]
        tokens *= 2
    sizes = [*(size for size in sizes if size < max_num_batched_tokens), max_num_batched_tokens]
    shapes = set()
    for size in sizes:
        for prefills in (max(_FEW_PREFILLS, size // _TOKENS_PER_PREFILL), size):
            shapes.add(StepShape(size, min(size, max_num_seqs), min(prefills, max_num_seqs)))
    return sorted(shapes)


def chunk_shape(shapes: Sequence[StepShape], needed: StepShape) -> StepShape | None:
    """The first of the rising `shapes` that holds `needed`, or None."""
    return next(
        (shape for shape in shapes if all(size >= least for size, least in zip(shape, needed, strict=True))), None
    )
