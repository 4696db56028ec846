"""All-reduce through memory that the GPUs of one host map from each other: a few microseconds where NCCL takes thirty.

Small sums take one shot (every rank reads all parts and adds them), larger ones two (every rank adds its share of the
elements and writes the sum to all), the largest go to NCCL, as do dtypes other than bfloat16 and float32. Multicast is
never used. Both kernels add the ranks' parts in rank order, rounding to the dtype after each, so a sum is the same on
all ranks and does not depend on which of the two made it; NCCL's may differ in the last bit.

Why calls in a row cannot race. Either kernel begins by waiting until every rank has begun it, which a rank does only
when its earlier work on the stream is done: so all parts are written before any is read. It ends by waiting until
every rank is done reading and writing memory of the others: so what comes after it on the stream may overwrite the
buffer. One buffer would do for that. Two are used in turn for the sake of two-shot results, which stay in the buffer:
they must outlive the writing of the next part. All this holds for one stream, or streams that wait for each other.

A rank that dies leaves the others waiting on their device for good; noticing that is the work of whoever watches the
processes. What is summed is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.platform.agreement import UnavailableError, on_all_ranks

log = logging.getLogger(__name__)

_ALIGNMENT = 16  # bytes of the kernels' widest access, and what they want sizes to be multiples of
_DTYPES = (torch.bfloat16, torch.float32)
# A call in a graph, one shot against two: on four H200 9.0 us against 9.3 at 160 KB and 14.6 against 10.6 at 640 KB, on
# two 6.9 against 7.4 at 40 KB and 7.9 against 7.4 at 160 KB. Groups of other sizes are not measured
_ONE_SHOT_BYTES = {2: 2**16, 4: 2**18}
_ONE_SHOT_BYTES_OF_MORE = 2**16
# At 10 MB two shots took 59.9 us on four and 39.4 on two, NCCL 88.4 and 53.9
_TWO_SHOT_BYTES = 2**24


@dataclass(frozen=True)
class ReductionLimits:
    """Sizes in bytes up to which a sum takes one shot, or two; larger ones go to NCCL. Equal on all ranks."""

    one_shot: int
    two_shot: int

    @classmethod
    def measured(cls, world_size: int) -> ReductionLimits:
        """What was fastest for a group of this size."""
        return cls(_ONE_SHOT_BYTES.get(world_size, _ONE_SHOT_BYTES_OF_MORE), _TWO_SHOT_BYTES)


class SymmetricCommunicator(GroupCommunicator):
    """A Communicator over the default process group, which must be NCCL's; made by `open_communicator`.

    Every rank must make the same calls in the same order, on one stream; all of them can be captured in a graph.
    """

    def __init__(self, buffer: torch.Tensor, limits: ReductionLimits) -> None:
        """`buffer` is symmetric memory of uint8, already exchanged: two halves, each at least the largest limit."""
        super().__init__()
        self._limits = limits
        self._halves = buffer.chunk(2)
        self._turn = 0
        self._group = _group().group_name

    def reduce_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised [rows, columns] for the part that the next `all_reduce` sums, which then copies nothing.

        Where sums of this size or dtype go to NCCL it is ordinary memory. Every call before that `all_reduce` gives
        the same memory.
        """
        if self._takes(rows * columns * dtype.itemsize, dtype):
            return _view(self._halves[self._turn], (rows, columns), dtype)
        return torch.empty((rows, columns), dtype=dtype, device=self._halves[0].device)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in a new tensor or over `tensor`.

        A sum over what `reduce_buffer` gave may lie in it: use it before the reduction after the next one, or copy it.
        """
        size = tensor.numel() * tensor.element_size()
        if not self._takes(size, tensor.dtype):
            return super().all_reduce(tensor)
        half = self._halves[self._turn]
        # Not in reduce_buffer: only here do all ranks keep step for certain
        self._turn = 1 - self._turn
        in_buffer = tensor.data_ptr() == half.data_ptr() and tensor.is_contiguous()
        # torch's own operator that also copies the part signals before all of a block's threads have copied theirs
        part = tensor if in_buffer else _view(half, tensor.shape, tensor.dtype).copy_(tensor)
        if size <= self._limits.one_shot:
            total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group)
            return total
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._group)
        return part if in_buffer else tensor.copy_(part)

    def _takes(self, size: int, dtype: torch.dtype) -> bool:
        limit = max(self._limits.one_shot, self._limits.two_shot)
        return dtype in _DTYPES and 0 < size <= limit and size % _ALIGNMENT == 0


def open_communicator(device: torch.device, limits: ReductionLimits | None = None) -> GroupCommunicator:
    """A SymmetricCommunicator, tried out, or NCCL's with the reason logged. Every rank of the group must call it.

    `device` is this rank's GPU; `limits` default to measured ones. Should a rank fail between the two kernels of the
    trial, the others wait on their devices until whoever watches the start gives up.
    """
    chosen = limits or ReductionLimits.measured(dist.get_world_size())
    try:
        on_all_ranks(device, lambda: _require_one_host(device))
        buffer = on_all_ranks(device, lambda: _allocate(device, chosen))
        on_all_ranks(device, lambda: _exchange(buffer))
        communicator = SymmetricCommunicator(buffer, chosen)
        on_all_ranks(device, lambda: _try_out(buffer))
    except UnavailableError as problem:
        log.warning("all-reduce goes through NCCL, symmetric memory cannot be used: %s", problem)
        return GroupCommunicator()
    return communicator


def _require_one_host(device: torch.device) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname() + (boot_id.read_text() if boot_id.exists() else "")
    mark = int.from_bytes(hashlib.blake2b(host.encode(), digest_size=7).digest(), "big")
    least_and_largest = torch.tensor([mark, -mark], dtype=torch.int64, device=device)
    dist.all_reduce(least_and_largest, op=dist.ReduceOp.MIN)
    if least_and_largest.sum().item() != 0:
        raise UnavailableError("the ranks are on several hosts")


def share_memory(size: int, device: torch.device) -> list[torch.Tensor]:
    """uint8 [size] of every rank, as this process sees it, in rank order; uninitialised. Every rank must call it.

    A rank must keep its own as long as another uses it.

    Raises:
        UnavailableError: memory cannot be had or exchanged, here or elsewhere.
    """
    memory = on_all_ranks(device, lambda: _empty(size, device))
    return on_all_ranks(device, lambda: _views(memory))


def _views(memory: torch.Tensor) -> list[torch.Tensor]:
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, _group())
    own, views = dist.get_rank(), []
    for rank in range(dist.get_world_size()):
        view = handle.get_buffer(rank, memory.shape, memory.dtype)
        if rank == own and view.data_ptr() != memory.data_ptr():
            raise UnavailableError("symmetric memory does not begin where its tensor does")
        views.append(memory if rank == own else view)
    return views


def _allocate(device: torch.device, limits: ReductionLimits) -> torch.Tensor:
    half = -(-max(limits.one_shot, limits.two_shot) // _ALIGNMENT) * _ALIGNMENT
    # One allocation: the kernels go by the offset in it, not by where a pool has put a second one
    return _empty(2 * half, device)


def _empty(size: int, device: torch.device) -> torch.Tensor:
    # Read when memory is exchanged; on machines where multicast is switched off, asking for it fails
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(size, dtype=torch.uint8, device=device)


def _exchange(buffer: torch.Tensor) -> None:
    import torch.distributed._symmetric_memory as symmetric_memory

    symmetric_memory.rendezvous(buffer, _group())


def _try_out(buffer: torch.Tensor) -> None:
    """Both kernels on both halves, with sums that every dtype holds exactly. It also loads them before any capture."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right = []
    for dtype in _DTYPES:
        count = min(buffer.numel() // 2 // dtype.itemsize, 4096)
        pattern = torch.arange(count, device=buffer.device) % 5
        expected = (pattern * world_size + world_size * (world_size - 1) // 2).to(dtype)
        for half in buffer.chunk(2):
            part = _view(half, (count,), dtype).copy_(pattern + rank)
            one_shot = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", _group().group_name)
            two_shot = torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", _group().group_name)
            right += [torch.equal(one_shot, expected), torch.equal(two_shot, expected)]
    if not all(right):  # only now: a rank that left earlier would keep the others waiting
        raise UnavailableError("a trial sum was wrong")


def _view(half: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The beginning of `half` as a contiguous tensor."""
    return half[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
