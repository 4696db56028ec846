"""Sums over the ranks of one host that add the residual and norm at once, for row-parallel layers of one width.

What the sums are of is not known here.
"""

from __future__ import annotations

import logging
from math import prod

import torch

from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.kernels.sum_norm import (
    MAX_PROGRAMS,
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

        `residual` is written to, and good for nothing but to be handed to the next sum of as many rows.
        """
        if len(part) <= self._one_shot.max_rows:
            return sum_add_rms_norm_one_shot(part, residual, weight, eps, self._one_shot)
        return sum_add_rms_norm_two_shots(len(part), residual, weight, eps, self._two_shots)


def open_sum_norm(comm: Communicator, size: int, dtype: torch.dtype, max_rows: int) -> SumNorm | None:
    """For sums of `size` elements a row and `max_rows` rows or what fits, tried out; None where the ranks share no
    memory, with the reason logged. Every rank of the group must call it."""
    if not isinstance(comm, SymmetricCommunicator):
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    row_bytes = size * dtype.itemsize
    one_shot_bytes = _ONE_SHOT_BYTES.get(comm.world_size, _ONE_SHOT_BYTES_OF_MORE)
    few = max(1, min(one_shot_bytes // row_bytes, max_rows))
    many = max(few, min(_TWO_SHOT_BYTES // row_bytes, max_rows))
    inbox = OneShotMemory.inbox_shape(few, comm.world_size, size)
    shapes = [(inbox, OneShotMemory.inbox_dtype(dtype)), ((2, MAX_PROGRAMS), torch.int32), *[((many, size), dtype)] * 2]
    try:
        inboxes, meetings, parts, normed = _share(shapes, device)
        on_all_ranks(device, lambda: (inboxes[comm.rank].fill_(-1), meetings[comm.rank].zero_()))
        turns = torch.zeros(few, dtype=torch.int32, device=device)
        sums = SumNorm(OneShotMemory(comm.rank, inboxes, turns), TwoShotMemory(comm.rank, parts, normed, meetings))
        on_all_ranks(device, lambda: _try_out(sums, comm, size, dtype, {few, many}))
    except UnavailableError as problem:
        log.warning("norms are not joined with sums over ranks: %s", problem)
        return None
    return sums


def rehearse_sum_norm(world_size: int, rows: torch.Tensor) -> None:
    """Compile both kernels for a group of this size and `rows` [0, size]; nothing is launched."""
    size, dtype = rows.shape[1], rows.dtype
    inbox = rows.new_empty(OneShotMemory.inbox_shape(0, world_size, size), dtype=OneShotMemory.inbox_dtype(dtype))
    numbers = rows.new_empty(0, dtype=torch.int32)
    weight = rows.new_empty(size)
    one_shot = OneShotMemory(0, (inbox,) * world_size, numbers)
    two_shots = TwoShotMemory(0, (rows,) * world_size, (rows,) * world_size, (numbers,) * world_size)
    sum_add_rms_norm_one_shot(rows, rows, weight, 0.0, one_shot)
    sum_add_rms_norm_two_shots(0, rows, weight, 0.0, two_shots)


def _share(shapes: list[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """For each shape and dtype the tensors of all ranks, one behind the other in one exchanged allocation."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    memories = share_memory(starts[-1], device)
    return [
        tuple(memory[start : start + size].view(dtype).view(shape) for memory in memories)
        for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
    ]


def _try_out(sums: SumNorm, comm: Communicator, size: int, dtype: torch.dtype, counts: set[int]) -> None:
    """Both ways, with values that every dtype holds exactly."""
    world_size = comm.world_size
    right = []
    for rows in sorted(counts):
        residual = torch.ones(rows, size, dtype=dtype, device="cuda")
        part = sums.buffer(rows)
        part = torch.empty_like(residual) if part is None else part
        part.fill_(comm.rank)
        normed = sums(part, residual, torch.full((size,), 2.0, dtype=dtype, device="cuda"), 0.0)
        total = 1 + world_size * (world_size - 1) // 2
        right += [bool((normed - 2).abs().max() < 0.05), bool((residual[comm.rank :: world_size] == total).all())]
    if not all(right):
        raise UnavailableError("a trial sum was wrong")
