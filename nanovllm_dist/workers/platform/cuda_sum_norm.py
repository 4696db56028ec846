"""Sums over the ranks of one host that add the residual and norm at once, for row-parallel layers of one width.

What the sums are of is not known here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.kernels.sum_norm import (
    OneShotMemory,
    TwoShotMemory,
    sum_add_rms_norm_one_shot,
    sum_add_rms_norm_two_shots,
)
from nanovllm_dist.workers.platform.agreement import UnavailableError, on_all_ranks
from nanovllm_dist.workers.platform.symmetric_memory import SymmetricCommunicator, share_memory

log = logging.getLogger(__name__)

_ALIGNMENT = 256
# In a graph on two H200 64 rows of 10 KB took 6.3 us in one shot and 7.5 in two. Larger groups are not measured; every
# rank stores its rows as often as there are ranks
_ONE_SHOT_BYTES = {2: 5 * 2**17}
_ONE_SHOT_BYTES_OF_MORE = 2**18
_TWO_SHOT_BYTES = 2**27  # of memory for parts, and as much for what was normed


class SumNorm:
    """Sums of up to `max_rows` rows over the ranks; made by `open_sum_norm`. All ranks make the same calls in the same
    order, on one stream; all of them can be captured in a graph."""

    def __init__(self, one_shot: OneShotMemory, two_shots: TwoShotMemory) -> None:
        self._one_shot = one_shot
        self._two_shots = two_shots
        self.max_rows = two_shots.max_rows

    def buffer(self, rows: int) -> torch.Tensor | None:
        """Where this rank's part of the next sum must be, [rows, size]; None if it may be anywhere."""
        return None if rows <= self._one_shot.max_rows else self._two_shots.parts[self._two_shots.rank][:rows]

    def __call__(self, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """part, residual [T, size] -> norm(sum of parts + residual) [T, size], good until the next call.

        `residual` is written to, and good for nothing but to be handed to the next sum of as many rows. Raises
        ValueError if the part is not where `buffer` wants it.
        """
        buffer = self.buffer(len(part))
        if buffer is None:
            return sum_add_rms_norm_one_shot(part, residual, weight, eps, self._one_shot)
        if part.data_ptr() != buffer.data_ptr():
            raise ValueError(f"a part of {len(part)} rows is to be written to the buffer of this sum")
        return sum_add_rms_norm_two_shots(len(part), residual, weight, eps, self._two_shots)


def open_sum_norm(comm: Communicator, size: int, dtype: torch.dtype, max_rows: int) -> SumNorm | None:
    """For sums of `size` elements a row and `max_rows` rows or what fits, tried out; None where the ranks share no
    memory, with the reason logged.

    Every rank of the group must call it. Should a rank fail between the kernels of the trial, the others wait on their
    devices until whoever watches the start gives up.
    """
    if not isinstance(comm, SymmetricCommunicator):
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    programs = _programs(device)
    row_bytes = size * dtype.itemsize
    one_shot_bytes = _ONE_SHOT_BYTES.get(comm.world_size, _ONE_SHOT_BYTES_OF_MORE)
    few = max(1, min(one_shot_bytes // row_bytes, max_rows, programs))
    many = max(few, min(_TWO_SHOT_BYTES // row_bytes, max_rows))
    layout = _Layout(comm.rank, comm.world_size, size, dtype, few, many, programs)
    try:
        memories = share_memory(layout.num_bytes, device)
        trial = on_all_ranks(device, lambda: _Trial(layout, memories))
        on_all_ranks(device, trial.run)
    except UnavailableError as problem:
        log.warning("norms are not joined with sums over ranks: %s", problem)
        return None
    return trial.sums


def rehearse_sum_norm(world_size: int, rows: torch.Tensor) -> None:
    """Compile both kernels for a group of this size and `rows` [0, size]; nothing is launched."""
    size, dtype = rows.shape[1], rows.dtype
    inbox = rows.new_empty(OneShotMemory.inbox_shape(0, world_size, size), dtype=OneShotMemory.inbox_dtype(dtype))
    numbers = rows.new_empty((2, 0), dtype=torch.int32)
    weight = rows.new_empty(size)
    one_shot = OneShotMemory(0, (inbox,) * world_size, numbers[0])
    two_shots = TwoShotMemory(0, (rows,) * world_size, (rows,) * world_size, (numbers,) * world_size)
    sum_add_rms_norm_one_shot(rows, rows, weight, 0.0, one_shot)
    sum_add_rms_norm_two_shots(0, rows, weight, 0.0, two_shots)


def _programs(device: torch.device) -> int:
    """How many programs certainly run at once on the GPU of every rank."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    least = torch.tensor([processors], dtype=torch.int32, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


@dataclass(frozen=True)
class _Layout:
    """Where in a rank's memory what lies; equal on all ranks but for `rank`."""

    rank: int
    world_size: int
    size: int
    dtype: torch.dtype
    few: int
    many: int
    programs: int

    @property
    def _shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        inbox = OneShotMemory.inbox_shape(self.few, self.world_size, self.size)
        rows = (self.many, self.size)
        return [
            (inbox, OneShotMemory.inbox_dtype(self.dtype)),
            ((2, self.programs), torch.int32),
            (rows, self.dtype),
            (rows, self.dtype),
        ]

    @property
    def _starts(self) -> list[int]:
        starts = [0]
        for shape, dtype in self._shapes:
            starts.append(starts[-1] + -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT)
        return starts

    @property
    def num_bytes(self) -> int:
        """Of a rank's memory."""
        return self._starts[-1]

    def cut(self, memories: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Inboxes, meetings, parts and normed rows of all ranks."""
        return [
            tuple(memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape) for memory in memories)
            for start, (shape, dtype) in zip(self._starts[:-1], self._shapes, strict=True)
        ]


class _Trial:
    """Sums by both ways, of values that every dtype holds exactly; all but the sums is done when it is made."""

    def __init__(self, layout: _Layout, memories: list[torch.Tensor]) -> None:
        rank, size, dtype = layout.rank, layout.size, layout.dtype
        inboxes, meetings, parts, normed = layout.cut(memories)
        inboxes[rank].fill_(-1)
        meetings[rank].zero_()
        self._rank, self._world_size = rank, layout.world_size
        turns = torch.zeros(layout.few, dtype=torch.int32, device=inboxes[rank].device)
        self.sums = SumNorm(OneShotMemory(rank, inboxes, turns), TwoShotMemory(rank, parts, normed, meetings))
        rehearse_sum_norm(layout.world_size, parts[rank][:0])
        self._weight = torch.full((size,), 2.0, dtype=dtype, device=turns.device)
        self._rows = sorted({layout.few, min(layout.few + 3, layout.many)})
        self._residuals = [torch.empty(rows, size, dtype=dtype, device=turns.device) for rows in self._rows]
        torch.cuda.synchronize()  # kernels read weights ahead of their turn

    def run(self) -> None:
        """Raises UnavailableError if a sum is wrong. Each comes three times, for as many places as a row has."""
        right = []
        for rows, residual in zip(self._rows, self._residuals, strict=True):
            for _ in range(3):
                residual.fill_(1)
                buffer = self.sums.buffer(rows)
                part = torch.empty_like(residual) if buffer is None else buffer
                normed = self.sums(part.fill_(self._rank), residual, self._weight, 0.0)
                total = 1 + self._world_size * (self._world_size - 1) // 2
                right += [(normed - 2).abs().max() < 0.05, (residual[self._rank :: self._world_size] == total).all()]
        if not all(bool(one) for one in right):  # only now: a rank that left earlier would keep the others waiting
            raise UnavailableError("a trial sum was wrong")
