"""Sums over ranks with residual and norm, against fp64, by ranks that share one GPU.

Each has a stream there and tensors of its own, and its kernels wait for those of the others. What the way between two
GPUs may change is looked at in `test_symmetric_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from nanovllm_dist.workers.kernels.sum_norm import (
    OneShotMemory,
    TwoShotMemory,
    sum_add_rms_norm_one_shot,
    sum_add_rms_norm_two_shots,
)
from nanovllm_dist.workers.platform.cuda_sum_norm import rehearse_sum_norm

DEVICE, EPS = "cuda", 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW = 16
# Those of four ranks are to run at once on one GPU
PROGRAMS = 24
SIZES = (64, 1000, 5120)
IN_A_ROW, IN_A_GRAPH = 1000, 20


class Group:
    """Ranks on streams of one GPU."""

    def __init__(self, world_size: int, size: int, dtype: torch.dtype, max_rows: int) -> None:
        def each(*shape: int, dtype: torch.dtype, value: float) -> tuple[torch.Tensor, ...]:
            return tuple(torch.full(shape, value, dtype=dtype, device=DEVICE) for _ in range(world_size))

        rehearse_sum_norm(world_size, torch.empty(0, size, dtype=dtype, device=DEVICE))
        inbox = OneShotMemory.inbox_shape(FEW, world_size, size)
        inboxes = each(*inbox, dtype=OneShotMemory.inbox_dtype(dtype), value=-1)
        turns = each(FEW, dtype=torch.int32, value=0)
        self.one_shot = [OneShotMemory(rank, inboxes, turns[rank]) for rank in range(world_size)]
        parts, normed = (each(max_rows, size, dtype=dtype, value=float("nan")) for _ in range(2))
        meetings = each(2, PROGRAMS, dtype=torch.int32, value=0)
        self.two_shots = [TwoShotMemory(rank, parts, normed, meetings) for rank in range(world_size)]
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]
        for stream in self.streams:  # to get memory from the device later would wait for kernels that wait for others
            with torch.cuda.stream(stream):
                torch.empty(2**18, device=DEVICE)
                torch.empty(2**24, device=DEVICE)
        torch.cuda.synchronize()

    def ranks(self) -> Iterator[int]:
        """Each with its stream current."""
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                yield rank

    def sum(
        self, way: str, parts: list[torch.Tensor], residuals: list[torch.Tensor], weight: torch.Tensor
    ) -> list[torch.Tensor]:
        """What each rank gets."""
        if way == "two shots":
            for memory, part in zip(self.two_shots, parts, strict=True):
                memory.parts[memory.rank][: len(part)].copy_(part)
        torch.cuda.synchronize()
        rows = len(parts[0])
        normed = []
        for rank in self.ranks():
            if way == "one shot":
                one = sum_add_rms_norm_one_shot(parts[rank], residuals[rank], weight, EPS, self.one_shot[rank])
            else:
                one = sum_add_rms_norm_two_shots(rows, residuals[rank], weight, EPS, self.two_shots[rank])
            normed.append(one)
        torch.cuda.synchronize()
        return [one.clone() for one in normed]


def random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inputs(
    world_size: int, rows: int, size: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    parts = [random(rank, rows, size, dtype=dtype) for rank in range(world_size)]
    return parts, random(8, rows, size, dtype=dtype), random(9, size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("way", "rows"), [("one shot", 1), ("one shot", FEW), ("two shots", 3), ("two shots", 301)])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rows_are_summed_and_normed(world_size: int, way: str, rows: int, size: int, dtype: torch.dtype) -> None:
    parts, residual, weight = inputs(world_size, rows, size, dtype)
    group = Group(world_size, size, dtype, rows)
    residuals = [residual.clone() for _ in parts]
    normed = group.sum(way, parts, residuals, weight)
    eps = torch.finfo(dtype).eps
    terms = torch.stack([*parts, residual]).double()
    exact = terms.sum(0)
    # rounded once to the dtype, and by each addition in fp32
    bound = eps / 2 * exact.abs() + (world_size + 1) * torch.finfo(torch.float32).eps * terms.abs().sum(0)
    for rank, total in enumerate(residuals):
        mine = slice(None) if way == "one shot" else slice(rank, None, world_size)
        assert ((total.double() - exact).abs()[mine] <= 1.01 * bound[mine]).all()
        scale = (total.double()[mine].pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        expected = total.double()[mine] * scale * weight.double()
        allowed = (1.1 * eps + 1e-6) * expected.abs() + 1e-6 * scale
        assert ((normed[rank].double()[mine] - expected).abs() <= allowed).all()
    assert all(torch.equal(one, normed[0]) for one in normed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_both_ways_give_the_same_bits(world_size: int) -> None:
    parts, residual, weight = inputs(world_size, FEW, 5120, torch.bfloat16)
    group = Group(world_size, 5120, torch.bfloat16, FEW)
    ways = {
        way: group.sum(way, parts, [residual.clone() for _ in parts], weight)[0] for way in ("one shot", "two shots")
    }
    assert torch.equal(ways["one shot"], ways["two shots"])


def test_a_row_does_not_depend_on_the_others() -> None:
    parts, residual, weight = inputs(2, FEW, 5120, torch.bfloat16)
    group = Group(2, 5120, torch.bfloat16, FEW)
    together = group.sum("one shot", parts, [residual.clone() for _ in parts], weight)[0]
    alone = group.sum("one shot", [part[3:4] for part in parts], [residual[3:4].clone() for _ in parts], weight)[0]
    assert torch.equal(alone, together[3:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_any_bits_arrive(dtype: torch.dtype) -> None:
    """NaN, whatever its bits, infinities and negative zeros among them: none is taken for a part that is missing."""
    integers = OneShotMemory.inbox_dtype(dtype)
    parts, residual, weight = inputs(2, 2, 64, dtype)
    odd = torch.tensor([-1, -2, 1 << (8 * dtype.itemsize - 2)], dtype=integers, device=DEVICE).view(dtype)
    parts[0][0, :3] = odd
    parts[1][0, 0] = odd[0]
    parts[0][1], parts[1][1], residual[1] = -0.0, -0.0, -0.0
    residuals = [residual.clone() for _ in parts]
    normed = Group(2, 64, dtype, 2).sum("one shot", parts, residuals, weight)
    assert residuals[0][0, :2].isnan().all()
    assert normed[0][0].isnan().all()
    assert (normed[0][1] == 0).all()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("way", ["one shot", "two shots"])
def test_a_thousand_sums_in_a_row_do_not_race(way: str, world_size: int) -> None:
    """In graphs, of as many rows as come, with ranks delayed in turn; small integers, so that a stale or half-written
    part shows."""
    size = 1024
    group = Group(world_size, size, torch.bfloat16, 64)
    steps = [torch.zeros((), device=DEVICE) for _ in group.streams]
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in group.streams]
    columns = torch.arange(size, device=DEVICE) % 7
    weight = torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
    counts = [1, 5, FEW, 2] if way == "one shot" else [64, 3, 30, 1]

    def one_sum(rank: int, index: int) -> None:
        rows = counts[index % len(counts)]
        if index % (2 * world_size) == 2 * rank:
            torch.cuda._sleep(20_000)
        steps[rank].add_(1).remainder_(11)
        residual = torch.zeros(rows, size, dtype=torch.bfloat16, device=DEVICE)
        value = (columns + steps[rank] + rank).expand(rows, size)
        if way == "one shot":
            sum_add_rms_norm_one_shot(value.to(torch.bfloat16), residual, weight, EPS, group.one_shot[rank])
            mine = residual
        else:
            group.two_shots[rank].parts[rank][:rows].copy_(value)
            normed = sum_add_rms_norm_two_shots(rows, residual, weight, EPS, group.two_shots[rank])
            mine = residual[rank::world_size]
            wrong[rank].add_((normed != normed[0]).any())
        expected = (columns + steps[rank]) * world_size + world_size * (world_size - 1) // 2
        wrong[rank].add_((mine != expected).any())

    graphs = []
    for rank in group.ranks():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            for index in range(IN_A_GRAPH):
                one_sum(rank, index)
        graphs.append(graph)
    for _ in range(IN_A_ROW // IN_A_GRAPH):
        for rank in group.ranks():
            graphs[rank].replay()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0] * world_size


def one_shot(group: Group, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    sum_add_rms_norm_one_shot(part, residual, weight, EPS, group.one_shot[0])


def two_shots(group: Group, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    sum_add_rms_norm_two_shots(len(part), residual, weight, EPS, group.two_shots[0])


@pytest.mark.parametrize("call", [one_shot, two_shots])
def test_what_does_not_fit_is_refused(call: Callable[..., None]) -> None:
    group = Group(2, 64, torch.bfloat16, FEW)
    rows, weight = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE), torch.zeros(64, dtype=torch.bfloat16)
    many = torch.zeros(FEW + 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="17 rows in memory for 16"):
        call(group, many, many, weight.to(DEVICE))
    with pytest.raises(ValueError, match="must agree"):
        call(group, rows, rows[:1], weight.to(DEVICE))
    with pytest.raises(ValueError, match="must agree"):
        call(group, rows, rows.float(), weight.to(DEVICE))
    with pytest.raises(ValueError, match="adjacent"):
        call(group, rows, rows.t().contiguous().t(), weight.to(DEVICE))
