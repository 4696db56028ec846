"""Sums through symmetric memory, alone and with norms, on as many GPUs as there are (2 to 4), in real processes.

One group of processes runs all checks, since its start takes most of the time; each test reads what came out of one.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("triton")

from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.kernels import dependent_launch
from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.few_rows_linear import MAX_ROWS, few_rows_gated, few_rows_linear
from nanovllm_dist.workers.platform.cuda_sum_norm import SumNorm, open_sum_norm
from nanovllm_dist.workers.platform.symmetric_memory import (
    ReductionLimits,
    SymmetricCommunicator,
    open_communicator,
)

LIMITS = ReductionLimits(one_shot=2**18, two_shot=2**23)
HIDDEN, EPS = 5120, 1e-6
# Rows by the way they take: one shot, two shots, NCCL
ROWS = {"one shot": 4, "two shots": 200, "NCCL": 1000}
BACK_TO_BACK = 1000
LAYERS, INTERMEDIATE = 60, 1536
# With norms, in this order: one shot takes up to 64 on two ranks, two take the others
JOINED_ROWS = [1, 100, 16, 777, 101, 3, 5, 64]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, in rank order."""
    count = min(torch.cuda.device_count(), 4)
    if count < 2:
        pytest.skip("needs 2 GPUs")
    directory = tmp_path_factory.mktemp("symmetric")
    # ranks that wait on their GPUs for good must not outlive the test
    torch.multiprocessing.spawn(run_rank, (count, directory), nprocs=count, daemon=True)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(count)]


def run_rank(rank: int, world_size: int, directory: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    comm = open_communicator(device, LIMITS)
    found: dict[str, Any] = {"kind": type(comm).__name__}
    if isinstance(comm, SymmetricCommunicator):
        found["sums"] = {
            f"{way}, {dtype}, {place}": check_sum(comm, rows, dtype, place == "buffer")
            for way, rows in ROWS.items()
            for dtype in (torch.bfloat16, torch.float32, torch.float16)
            for place in ("buffer", "ordinary memory")
        }
        found["ways agree"] = check_ways_agree(comm, rank)
        found["outlives"] = check_result_outlives_the_next_part(comm)
        found["eager"] = {way: check_in_a_row(comm, rows, captured=False) for way, rows in ROWS.items()}
        found["graph"] = {way: check_in_a_row(comm, rows, captured=True) for way, rows in ROWS.items()}
        found["joined"] = {
            str(dtype): [check_joined(comm, dtype, captured) for captured in (False, True)]
            for dtype in (torch.bfloat16, torch.float32)
        }
        found["layers"] = {str(rows): check_layers(comm, rows) for rows in (1, MAX_ROWS, 100)}
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def part_of(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rank)
    return torch.randn(rows, HIDDEN, device="cuda", generator=generator).to(dtype)


def check_sum(comm: GroupCommunicator, rows: int, dtype: torch.dtype, in_buffer: bool) -> dict[str, Any]:
    """Error in terms of its bound, and a digest that is equal on all ranks if the sums are bit-equal."""
    assert isinstance(comm, SymmetricCommunicator)
    part = part_of(comm.rank, rows, dtype)
    if in_buffer:
        part = comm.reduce_buffer(rows, HIDDEN, dtype).copy_(part)
    total = comm.all_reduce(part)
    parts = torch.stack([part_of(rank, rows, dtype).double() for rank in range(comm.world_size)])
    # each of the n - 1 additions rounds a partial sum by at most eps / 2
    bound = (comm.world_size - 1) * torch.finfo(dtype).eps / 2 * parts.abs().sum(0) * 1.01 + 1e-30
    worst = ((total.double() - parts.sum(0)).abs() / bound).max().item()
    bits = total.contiguous().view(torch.int32).long()
    weights = torch.arange(bits.numel(), device=bits.device).view_as(bits) % 1_000_003 + 1
    return {"worst": worst, "digest": int((bits * weights).sum()), "shape": list(total.shape)}


def check_ways_agree(comm: SymmetricCommunicator, rank: int) -> bool:
    """The rows of a large sum are those of a small one, although they take two shots and one."""
    large = comm.all_reduce(part_of(rank, 200, torch.bfloat16)).clone()
    small = comm.all_reduce(part_of(rank, 200, torch.bfloat16)[:4].contiguous())
    return torch.equal(large[:4], small)


def check_result_outlives_the_next_part(comm: SymmetricCommunicator) -> bool:
    """A two-shot result stays while the next part is written and summed."""
    rows = ROWS["two shots"]
    first = comm.all_reduce(comm.reduce_buffer(rows, HIDDEN, torch.bfloat16).fill_(1.0))
    second = comm.all_reduce(comm.reduce_buffer(rows, HIDDEN, torch.bfloat16).fill_(2.0))
    return bool((first == comm.world_size).all()) and bool((second == 2 * comm.world_size).all())


def check_in_a_row(comm: SymmetricCommunicator, rows: int, captured: bool) -> int:
    """How many of BACK_TO_BACK sums of changing values were wrong; ranks are delayed in turn, to get out of step.

    Every value is a small integer, so that any stale or half-written part shows as an inequality.
    """
    step = torch.zeros((), device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    columns = torch.arange(HIDDEN, device="cuda") % 7
    world_size, per_graph = comm.world_size, 10

    def one_sum(index: int) -> None:
        if index % (2 * world_size) == 2 * comm.rank:
            torch.cuda._sleep(20_000)
        step.add_(1).remainder_(11)
        part = comm.reduce_buffer(rows, HIDDEN, torch.bfloat16)
        part.copy_((columns + step + comm.rank).expand(rows, HIDDEN))
        total = comm.all_reduce(part)
        expected = (columns + step) * world_size + world_size * (world_size - 1) // 2
        wrong.add_((total != expected).any())

    if not captured:
        for index in range(BACK_TO_BACK):
            one_sum(index)
        return int(wrong.item())
    one_sum(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(per_graph):
            one_sum(index)
    for _ in range(BACK_TO_BACK // per_graph):
        graph.replay()
    return int(wrong.item())


def check_joined(comm: SymmetricCommunicator, dtype: torch.dtype, captured: bool) -> list[int]:
    """How many of BACK_TO_BACK sums with norms, of row counts that change and so of both ways, were wrong in their sums
    and in their norms. As in `check_in_a_row` values change and are small integers, and ranks are delayed in turn."""
    sums = open_sum_norm(comm, HIDDEN, dtype, max(JOINED_ROWS))
    assert isinstance(sums, SumNorm)
    step = torch.zeros((), device="cuda")
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    columns = torch.arange(HIDDEN, device="cuda") % 7
    weight = (1 + columns % 3).to(dtype)
    bound = 1e-4 if dtype == torch.float32 else 0.03  # norms of another step may differ from these by less than 0.03
    world_size, rank = comm.world_size, comm.rank
    torch.cuda.synchronize()

    def one_sum(index: int) -> None:
        rows = JOINED_ROWS[index % len(JOINED_ROWS)]
        if index % (2 * world_size) == 2 * rank:
            torch.cuda._sleep(20_000)
        step.add_(1).remainder_(11)
        place = sums.buffer(rows)
        part = torch.empty(rows, HIDDEN, dtype=dtype, device="cuda") if place is None else place
        part.copy_((columns + step + rank).expand(rows, HIDDEN))
        residual = torch.ones(rows, HIDDEN, dtype=dtype, device="cuda")
        normed = sums(part, residual, weight, EPS)
        total = (columns + step) * world_size + world_size * (world_size - 1) // 2 + 1
        expected = total * (total.square().mean() + EPS).rsqrt() * weight
        mine = residual if place is None else residual[rank::world_size]
        wrong.add_(torch.stack(((mine != total).any(), ((normed - expected).abs() > bound).any())))

    if not captured:
        for index in range(BACK_TO_BACK):
            one_sum(index)
        return wrong.tolist()
    one_sum(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(2 * len(JOINED_ROWS)):
            one_sum(index)
    for index in range(BACK_TO_BACK // (2 * len(JOINED_ROWS))):
        graph.replay()
        if index % 10 == 0:
            one_sum(index)  # by operation, between replays
    return wrong.tolist()


@torch.inference_mode()
def check_layers(comm: SymmetricCommunicator, rows: int) -> dict[str, int]:
    """How many runs of layers whose kernels start early, sums with norms among them, differed from one whose kernels
    wait for each other; and a digest of that one."""
    sums = open_sum_norm(comm, HIDDEN, torch.bfloat16, rows)
    assert isinstance(sums, SumNorm)
    few = rows <= MAX_ROWS
    up = [part_of(100 + 10 * n + comm.rank, 2 * INTERMEDIATE, torch.bfloat16) * HIDDEN**-0.5 for n in range(3)]
    down = [part_of(200 + 10 * n + comm.rank, INTERMEDIATE, torch.bfloat16).t().contiguous() * 0.02 for n in range(2)]
    start, weight = part_of(300, rows, torch.bfloat16), torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()

    def run() -> torch.Tensor:
        normed, residual = start.clone(), start.clone()
        for layer in range(LAYERS):
            if layer % (2 * comm.world_size) == 2 * comm.rank:
                torch.cuda._sleep(20_000)
            gates = up[layer % 3]
            activated = few_rows_gated(normed, gates) if few else silu_mul(F.linear(normed, gates))
            place = sums.buffer(rows)
            part = torch.empty_like(normed) if place is None else place
            if few:
                few_rows_linear(activated, down[layer % 2], part)
            else:
                torch.mm(activated, down[layer % 2].t(), out=part)
            normed = sums(part, residual, weight, EPS)
        return normed.clone()  # of two shots it lies in memory that the next sum writes to

    dependent_launch.ENABLED = False
    expected = run()
    dependent_launch.ENABLED = True
    wrong = sum(not torch.equal(run(), expected) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for _ in range(20):
        output.fill_(float("nan"))
        graph.replay()
        wrong += not torch.equal(output, expected)
    assert expected.isfinite().all()
    return {"wrong": wrong, "digest": int(expected.view(torch.int16).long().sum())}


def test_symmetric_memory_is_used(outcomes: list[dict[str, Any]]) -> None:
    assert {outcome["kind"] for outcome in outcomes} == {"SymmetricCommunicator"}


def test_a_sum_is_the_fp32_sum_within_rounding(outcomes: list[dict[str, Any]]) -> None:
    worst = {name: max(outcome["sums"][name]["worst"] for outcome in outcomes) for name in outcomes[0]["sums"]}
    assert {name: ratio for name, ratio in worst.items() if not ratio <= 1.0} == {}


def test_all_ranks_get_the_same_bits(outcomes: list[dict[str, Any]]) -> None:
    for name in outcomes[0]["sums"]:
        assert len({outcome["sums"][name]["digest"] for outcome in outcomes}) == 1, name


def test_the_shape_stays(outcomes: list[dict[str, Any]]) -> None:
    for name, result in outcomes[0]["sums"].items():
        rows = next(count for way, count in ROWS.items() if name.startswith(way))
        assert result["shape"] == [rows, HIDDEN]


def test_one_shot_and_two_give_the_same_bits(outcomes: list[dict[str, Any]]) -> None:
    assert all(outcome["ways agree"] for outcome in outcomes)


def test_a_result_outlives_the_next_reduction(outcomes: list[dict[str, Any]]) -> None:
    assert all(outcome["outlives"] for outcome in outcomes)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_thousand_reductions_in_a_row_do_not_race(outcomes: list[dict[str, Any]], mode: str) -> None:
    assert [outcome[mode] for outcome in outcomes] == [dict.fromkeys(ROWS, 0)] * len(outcomes)


def test_a_thousand_sums_with_norms_in_a_row_do_not_race(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert {name: found for name, found in outcome["joined"].items() if found != [[0, 0], [0, 0]]} == {}


def test_layers_that_start_early_between_sums_give_the_bits_of_layers_that_wait(outcomes: list[dict[str, Any]]) -> None:
    assert all(layers["wrong"] == 0 for outcome in outcomes for layers in outcome["layers"].values())
    assert all(outcome["layers"] == outcomes[0]["layers"] for outcome in outcomes)
