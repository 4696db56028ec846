"""What ranks on one host tell each other, through memory that they share: a sum of one row in microseconds.

Gloo takes 0.4 ms for it, and a decoder of 30 layers needs 61 of them for a token. How it works is in cpu_group.c. The
memory has no name in any directory: the ranks open it through rank 0's process, so nothing is left however they end.
Where ranks are on several hosts, see other processes, or have no C compiler, gloo does the work.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from nanovllm_dist.errors import EngineDeadError
from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.platform.agreement import UnavailableError, on_all_ranks
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library

log = logging.getLogger("worker")

# Of a meeting; 8 rows of a hidden size of 16,384, which is what a step of few decodes sums at most
PART_BYTES = 2**18
_HEADER_BYTES = 128  # of each rank: its number of the last meeting, alone on its cache lines
_MARK_BYTES = 16
_CPU = torch.device("cpu")
_SUMMED = (torch.bfloat16, torch.float32)
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_ARGUMENTS = {
    "group_sum": [_POINTER, _POINTER, _LONG, _INT],
    "group_gather": [_POINTER, _POINTER, _POINTER, _LONG],
    "group_broadcast": [_POINTER, _POINTER, _LONG],
}


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("arrived", "parts", "processes")),
        ("part_bytes", _LONG),
        ("turn", ctypes.c_uint64),
        *((name, _INT) for name in ("rank", "ranks", "patience", "lost")),
    ]


class CpuGroup(GroupCommunicator):
    """A Communicator over the default process group, which must be gloo's; made by `open_group`.

    Every rank must make the same calls in the same order. Sums are added in rank order in float32 and rounded once.

    Raises, from every method:
        EngineDeadError: a rank has ended, or did not come in time. All later calls raise it too, and do nothing.
    """

    def __init__(self, library: ctypes.CDLL, memory: mmap.mmap, processes: list[int], patience: float) -> None:
        """`processes`: a descriptor of each rank's process, in rank order. `patience` in seconds."""
        super().__init__()
        self._sum, self._gather, self._broadcast = (_function(library, name) for name in _ARGUMENTS)
        self._memory = memory  # kept mapped
        self._processes = (_INT * len(processes))(*processes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._group = _Group(
            arrived=start,
            parts=start + self.world_size * _HEADER_BYTES,
            processes=ctypes.addressof(self._processes),
            part_bytes=PART_BYTES,
            rank=self.rank,
            ranks=self.world_size,
            patience=int(min(patience, 2**31 - 1)),
        )

    @property
    def pointer(self) -> int:
        """Where other kernels of the library find the group; `check` before and after each of them."""
        return ctypes.addressof(self._group)

    def check(self) -> None:
        """Raise what went wrong in a call of the library, if anything did."""
        lost = self._group.lost
        if lost > 0:
            raise EngineDeadError(f"rank {lost - 1} ended while rank {self.rank} waited for its part of a step")
        if lost < 0:
            raise EngineDeadError(
                f"rank {-lost - 1} sent rank {self.rank} nothing for {self._group.patience} s in the middle of a step"
            )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place where `tensor` is contiguous."""
        if tensor.dtype not in _SUMMED:
            self.check()
            return super().all_reduce(tensor)
        tensor = tensor.contiguous()
        self._call(self._sum, tensor.data_ptr(), tensor.numel(), tensor.dtype == torch.bfloat16)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Gather equal shapes to rank 0."""
        parts = self._exchange(tensor, self.rank == 0)
        return None if parts is None else list(parts)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather equal shapes everywhere."""
        parts = self._exchange(tensor, True)
        assert parts is not None
        return parts

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's content, in place."""
        packed = tensor.contiguous()
        self._call(self._broadcast, packed.data_ptr(), packed.nbytes)
        return tensor if packed is tensor else tensor.copy_(packed)

    def _exchange(self, tensor: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        tensor = tensor.contiguous()
        parts = tensor.new_empty(self.world_size, *tensor.shape) if wanted else None
        self._call(self._gather, tensor.data_ptr(), None if parts is None else parts.data_ptr(), tensor.nbytes)
        return parts

    def _call(self, function: Any, *arguments: Any) -> None:
        self.check()
        function(self.pointer, *arguments)
        self.check()


def open_group(store: Store, patience: float) -> GroupCommunicator:
    """A CpuGroup, or gloo's communicator with the reason logged. Every rank of the group must call it.

    `store` is the process group's; `patience`: seconds that one rank waits for another within a call.
    """
    with ExitStack() as until_all_have_it:
        try:
            library = on_all_ranks(_CPU, _library)
            on_all_ranks(_CPU, lambda: _announce(store, until_all_have_it))
            memory, processes = on_all_ranks(_CPU, lambda: _join(store))
        except UnavailableError as problem:
            log.warning("ranks talk through gloo, which is slower: %s", problem)
            return GroupCommunicator()
    return CpuGroup(library, memory, processes, patience)


def _library() -> ctypes.CDLL:
    library = kernel_library()
    if library is None:
        raise UnavailableError("there are no C kernels, see above")
    return library


def _announce(store: Store, closing: ExitStack) -> None:
    """Tell the others where this process is found; rank 0 also makes the memory, and a mark to know it by."""
    rank, descriptor, mark = dist.get_rank(), -1, os.urandom(_MARK_BYTES)
    if rank == 0:
        descriptor = os.memfd_create("nanovllm-ranks", os.MFD_CLOEXEC)
        closing.callback(os.close, descriptor)
        os.ftruncate(descriptor, _memory_bytes())
        os.pwrite(descriptor, mark, _memory_bytes() - _MARK_BYTES)
    # a process number means something to those who count processes alike, which containers do not
    counted_by = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    store.set(f"cpu_group/{rank}", f"{counted_by} {os.getpid()} {descriptor} {mark.hex()}")


def _join(store: Store) -> tuple[mmap.mmap, list[int]]:
    """The memory of rank 0, mapped, and a descriptor of each rank's process."""
    ranks = [store.get(f"cpu_group/{rank}").decode().split() for rank in range(dist.get_world_size())]
    if len({rank[0] for rank in ranks}) > 1:
        raise UnavailableError("the ranks are on several hosts, or in containers of their own")
    _counted_by, pid, made, mark = ranks[0]
    descriptor = os.open(f"/proc/{pid}/fd/{made}", os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(descriptor, _memory_bytes())
    finally:
        os.close(descriptor)
    if memory[-_MARK_BYTES:].hex() != mark:  # machines copied from one another count alike
        raise UnavailableError(f"what process {pid} has open is not the memory of these ranks")
    return memory, [os.pidfd_open(int(rank[1])) for rank in ranks]


def _memory_bytes() -> int:
    return dist.get_world_size() * (_HEADER_BYTES + 2 * PART_BYTES) + _MARK_BYTES


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = _ARGUMENTS[name], _INT
    return function
