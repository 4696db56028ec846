"""The sum over ranks, residual and RMSNorm behind a row-parallel product, in one launch: the rows of a sum are normed
where they are added, and what crosses between GPUs is all there is to wait for.

Few rows take one shot: a rank's program for a row stores its part to every rank, and adds what it finds in its own
memory. There is no signal beside the data. Memory waiting for a part holds a NaN that no part contains, in every
element, and the reader tries again until none is left. What makes this safe to repeat are three places for each row,
used in turn: when a rank stores part n + 2 it has read everybody's part n + 1, so everybody has left call n, in which
the place of n - 1, the same as that of n + 2, was cleared.

More rows take two shots: each rank adds, norms and stores to all its share of the rows, and the residual stays where
its row was added. All programs of a number, one in each rank, meet before they read parts of others and after they
have stored rows to others. A rank meets when its earlier work is done: so all parts are complete, and nobody still
reads what is overwritten.

A program waits for those of its number in the other ranks. So that none waits for one that finds no room, there must
be no more of them than run at once: whoever makes the memory sees to it. Kernels that start early do not take their
room, since they start when all of these have.

Both add the ranks' parts in rank order in fp32, then the residual, and round that sum once: all ranks get the same
bits, by either way. A rank that dies leaves the others waiting for good. Memory of other ranks comes in as tensors;
how it got there is not known here.

Storing to all and recognising arrival by content is the idea of the Lamport kernels in NVIDIA's TensorRT-LLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options
from nanovllm_dist.workers.kernels.norm import ELEMENTS_PER_THREAD, inverse_rms

_TURNS = tl.constexpr(3)
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class OneShotMemory:
    """What `sum_add_rms_norm_one_shot` of up to `max_rows` rows works in; the same sizes on all ranks.

    A row is a program, and all must fit on the device at once.

    Attributes:
        rank: of this process.
        inboxes: of each rank, as this process sees it: [3, max_rows, world size, size], integers as wide as the
            dtype. -1 in all of them when the first sum begins, on all ranks.
        turns: of this rank, int32 [max_rows], zeros in the beginning.
    """

    rank: int
    inboxes: tuple[torch.Tensor, ...]
    turns: torch.Tensor

    @property
    def max_rows(self) -> int:
        """Of one sum."""
        return len(self.turns)

    @staticmethod
    def inbox_shape(max_rows: int, world_size: int, size: int) -> tuple[int, ...]:
        """Of one rank."""
        return _TURNS.value, max_rows, world_size, size

    @staticmethod
    def inbox_dtype(dtype: torch.dtype) -> torch.dtype:
        """For sums of this dtype."""
        return _BITS[dtype.itemsize]


@dataclass(frozen=True)
class TwoShotMemory:
    """What `sum_add_rms_norm_two_shots` of up to `max_rows` rows works in; the same sizes on all ranks.

    Attributes:
        rank: of this process.
        parts: of each rank, as this process sees it, [max_rows, size]: this rank's is to be filled before a sum.
        normed: of each rank, [max_rows, size]: this rank's holds a sum's result until the next.
        meetings: of each rank, int32 [2, most programs], zeros in the beginning, on all ranks.
    """

    rank: int
    parts: tuple[torch.Tensor, ...]
    normed: tuple[torch.Tensor, ...]
    meetings: tuple[torch.Tensor, ...]

    @property
    def max_rows(self) -> int:
        """Of one sum."""
        return len(self.parts[self.rank])

    @property
    def max_programs(self) -> int:
        """Of one sum; they must all fit on the device at once."""
        return self.meetings[self.rank].shape[1]


def sum_add_rms_norm_one_shot(
    part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, memory: OneShotMemory
) -> torch.Tensor:
    """part [T, size] of this rank, residual [T, size], weight [size], of one dtype -> norm(sum of parts + residual).

    The sum with the residual is written over `residual`. Every rank makes the call, with as many rows. What comes back
    is new. Rows of part and residual may be apart by any stride.

    Raises:
        ValueError: more rows than the memory is for, rows of elements apart, or shapes or dtypes that differ.
    """
    rows, size = part.shape
    _check(part, residual, weight, rows, memory.max_rows)
    normed = torch.empty((rows, size), dtype=part.dtype, device=part.device)
    _one_shot_kernel[(rows,)](
        part,
        residual,
        weight,
        normed,
        memory.inboxes,
        memory.turns,
        memory.rank,
        part.stride(0),
        residual.stride(0),
        memory.max_rows,
        eps,
        BITS=tl.int16 if part.element_size() == 2 else tl.int32,
        WORLD=len(memory.inboxes),
        **_row_options(size),
    )
    return normed


def sum_add_rms_norm_two_shots(
    rows: int, residual: torch.Tensor, weight: torch.Tensor, eps: float, memory: TwoShotMemory
) -> torch.Tensor:
    """The same of the first `rows` rows of this rank's `memory.parts`; the result lies in this rank's `memory.normed`.

    Of `residual` [rows, size] only the rows that this rank adds are kept up: hand it to nothing but the next sum of as
    many rows.

    Raises:
        ValueError: see `sum_add_rms_norm_one_shot`.
    """
    part = memory.parts[memory.rank][:rows]
    _check(part, residual, weight, rows, memory.max_rows)
    world_size, size = len(memory.parts), part.shape[1]
    _two_shot_kernel[(min(triton.cdiv(rows, world_size), memory.max_programs),)](
        memory.parts,
        memory.normed,
        memory.meetings,
        residual,
        weight,
        rows,
        memory.rank,
        residual.stride(0),
        memory.max_programs,
        eps,
        WORLD=world_size,
        **_row_options(size),
    )
    return memory.normed[memory.rank][:rows]


def _row_options(size: int) -> dict[str, int | bool]:
    block = triton.next_power_of_2(size)
    num_warps = min(max(block // (32 * ELEMENTS_PER_THREAD), 1), 16)
    return {"SIZE": size, "BLOCK": block, "num_warps": num_warps, **launch_options()}


def _check(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, rows: int, max_rows: int) -> None:
    if rows > max_rows:
        raise ValueError(f"a sum of {rows} rows in memory for {max_rows}")
    if part.stride(1) != 1 or residual.stride(1) != 1 or weight.stride(0) != 1:
        raise ValueError("a sum with norm needs rows of adjacent elements")
    if (
        residual.shape != part.shape
        or weight.shape != part.shape[1:]
        or not part.dtype == residual.dtype == weight.dtype
    ):
        raise ValueError(
            f"a sum of parts {tuple(part.shape)} {part.dtype}, residual {tuple(residual.shape)} {residual.dtype}, "
            f"weight {tuple(weight.shape)} {weight.dtype}: shapes and dtypes must agree"
        )


@triton.jit
def _norm(total, weight, eps, SIZE: tl.constexpr):
    """A row that was summed in fp32, and its norm, both rounded to the weight's dtype."""
    rounded = total.to(weight.dtype)
    wide = rounded.to(tl.float32)
    normalised = (wide * inverse_rms(wide, eps, SIZE)).to(weight.dtype)
    return rounded, (normalised.to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit(do_not_specialize=["rank", "max_rows"])
def _one_shot_kernel(
    part_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    inbox_ptrs,
    turns_ptr,
    rank,
    part_stride,
    residual_stride,
    max_rows,
    eps,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WORLD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if DEPENDENT:
        gdc_wait()
    turn = tl.load(turns_ptr + row)
    part = tl.load(part_ptr + row.to(tl.int64) * part_stride + column, mask=inside, other=0.0)
    place = residual_ptr + row.to(tl.int64) * residual_stride + column
    residual = tl.load(place, mask=inside, other=0.0)

    # All bits set is a NaN; another NaN goes in its stead
    bits = part.to(BITS, bitcast=True)
    bits = tl.where(bits == -1, -2, bits).to(BITS)
    offset = (turn * max_rows + row) * (WORLD * SIZE)
    for peer in tl.static_range(WORLD):
        tl.store(inbox_ptrs[peer] + offset + rank * SIZE + column, bits, mask=inside)
    used = ((turn + 2) % _TURNS * max_rows + row) * (WORLD * SIZE)
    inbox_ptr = inbox_ptrs[0]
    for peer in tl.static_range(1, WORLD):
        if rank == peer:
            inbox_ptr = inbox_ptrs[peer]
    for sender in tl.static_range(WORLD):
        tl.store(inbox_ptr + used + sender * SIZE + column, tl.full([BLOCK], -1, BITS), mask=inside)

    total = tl.zeros([BLOCK], dtype=tl.float32)
    missing = 1
    while missing != 0:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        absent = tl.zeros([BLOCK], dtype=tl.int32)
        for sender in tl.static_range(WORLD):
            arrived = tl.load(inbox_ptr + offset + sender * SIZE + column, mask=inside, other=0, volatile=True)
            absent |= (arrived == -1).to(tl.int32)
            total += arrived.to(part.dtype, bitcast=True).to(tl.float32)
        missing = tl.max(absent, axis=0)
    total, normed = _norm(total + residual.to(tl.float32), weight, eps, SIZE)
    tl.store(place, total, mask=inside)
    tl.store(normed_ptr + row.to(tl.int64) * SIZE + column, normed, mask=inside)
    tl.store(turns_ptr + row, (turn + 1) % _TURNS)


@triton.jit(do_not_specialize=["rows", "rank", "max_programs"])
def _two_shot_kernel(
    part_ptrs,
    normed_ptrs,
    meeting_ptrs,
    residual_ptr,
    weight_ptr,
    rows,
    rank,
    residual_stride,
    max_programs,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WORLD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    if DEPENDENT:
        gdc_wait()
    _meet(meeting_ptrs, tl.program_id(0), rank, WORLD)
    for row in range(tl.program_id(0) * WORLD + rank, rows, tl.num_programs(0) * WORLD):
        start = tl.cast(row, tl.int64) * SIZE
        place = residual_ptr + tl.cast(row, tl.int64) * residual_stride + column
        residual = tl.load(place, mask=inside, other=0.0)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for peer in tl.static_range(WORLD):
            part = tl.load(part_ptrs[peer] + start + column, mask=inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        total, normed = _norm(total + residual.to(tl.float32), weight, eps, SIZE)
        tl.store(place, total, mask=inside)
        for peer in tl.static_range(WORLD):
            tl.store(normed_ptrs[peer] + start + column, normed, mask=inside)
    _meet(meeting_ptrs, max_programs + tl.program_id(0), rank, WORLD)


@triton.jit
def _meet(meeting_ptrs, place, rank, WORLD: tl.constexpr):
    """Return when the program has been called here in every rank: what each of them wrote before is visible after.

    A rank counts the others' arrivals and starts over by itself: none arrives again before it has left the next
    meeting, the other one of a kernel, for which it waits for this rank.
    """
    tl.debug_barrier()  # all threads' writes come before the arrival that one thread announces
    for peer in tl.static_range(WORLD):
        if rank != peer:
            tl.atomic_add(meeting_ptrs[peer] + place, 1, sem="release", scope="sys")
    own_ptr = meeting_ptrs[0]
    for peer in tl.static_range(1, WORLD):
        if rank == peer:
            own_ptr = meeting_ptrs[peer]
    own_ptr += place
    while tl.atomic_add(own_ptr, 0, sem="acquire", scope="sys") < WORLD - 1:
        pass
    tl.store(own_ptr, 0)
    tl.debug_barrier()
