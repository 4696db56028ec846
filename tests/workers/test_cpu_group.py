"""Ranks of one host, in real processes: what goes through the memory they share is what gloo would bring, whoever ends.

One group of processes runs all checks of a size, since its start takes most of the time; tests read what came out.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import in_processes, run_rank

from nanovllm_dist.errors import EngineDeadError
from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.platform import cpu_group
from nanovllm_dist.workers.platform.cpu_group import PART_BYTES, CpuGroup

WORLD_SIZES = (2, 3)
# Elements of bfloat16: one, a row, one meeting full, two and a bit, and nothing
COUNTS = (1, 576, PART_BYTES // 2, PART_BYTES + 6, 0)
IN_A_ROW = 2000


@pytest.fixture(scope="module", params=WORLD_SIZES)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, in rank order."""
    return in_processes(check_everything, request.param, tmp_path_factory.mktemp("ranks"))


def part(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(100 * rank + count)).to(dtype)


def check_everything(rank: int, group: GroupCommunicator, _directory: Path) -> dict[str, Any]:
    size, gloo = dist.get_world_size(), GroupCommunicator()
    sums, gathers, broadcasts = {}, {}, {}
    for count in COUNTS:
        for dtype in (torch.bfloat16, torch.float32, torch.int64):
            parts = [part(each, count, dtype) for each in range(size)]
            name = f"{count} {dtype}"
            exact = torch.stack(parts).double().sum(0)
            allowed = torch.finfo(dtype).eps * exact.abs() + size * 1e-6 if dtype.is_floating_point else 0
            sums[name] = bool(((group.all_reduce(parts[rank].clone()).double() - exact).abs() <= allowed).all())
            whole = group.gather(parts[rank])
            everywhere = group.all_gather(parts[rank])
            gathers[name] = torch.equal(everywhere, torch.stack(parts)) and (
                whole is None if rank else [each.tolist() for each in whole or []] == [each.tolist() for each in parts]
            )
            broadcasts[name] = torch.equal(group.broadcast(parts[rank].clone()), parts[0])
    total = torch.zeros(3)
    for turn in range(IN_A_ROW):  # of changing sizes, so that a rank that is early would read what is not there yet
        total += group.all_reduce(torch.full((3 + turn % 7 * 500,), float(rank + turn % 5)))[:3]
    expected = sum(size * (turn % 5) + size * (size - 1) // 2 for turn in range(IN_A_ROW))
    rows = part(rank, 6, torch.bfloat16).view(2, 3)
    return {
        "kind": type(group).__name__,
        "sums": sums,
        "gathers": gathers,
        "broadcasts": broadcasts,
        "in a row": total.tolist() == [expected] * 3,
        "bits": [value.hex() for value in group.all_reduce(part(rank, 999, torch.bfloat16)).tolist()],
        "strided": torch.equal(group.all_reduce(rows.t()), gloo.all_reduce(rows.clone()).t()),
        "shapes": [list(group.all_gather(rows).shape), list(rows.shape)],
        "names": [name for name in os.listdir("/dev/shm") if "nanovllm" in name],
    }


def test_ranks_of_one_host_share_memory_that_has_no_name(outcomes: list[dict[str, Any]]) -> None:
    assert [found["kind"] for found in outcomes] == ["CpuGroup"] * len(outcomes)
    assert all(found["names"] == [] for found in outcomes)


@pytest.mark.parametrize("operation", ["sums", "gathers", "broadcasts"])
def test_every_size_and_dtype_arrives_whole(outcomes: list[dict[str, Any]], operation: str) -> None:
    wrong = [
        (rank, name) for rank, found in enumerate(outcomes) for name, right in found[operation].items() if not right
    ]
    assert wrong == []


def test_a_sum_has_the_same_bits_on_every_rank(outcomes: list[dict[str, Any]]) -> None:
    assert len({tuple(found["bits"]) for found in outcomes}) == 1


def test_thousands_of_sums_in_a_row_never_mix(outcomes: list[dict[str, Any]]) -> None:
    assert all(found["in a row"] for found in outcomes)


def test_shapes_and_strides_are_kept(outcomes: list[dict[str, Any]]) -> None:
    assert all(found["strided"] for found in outcomes)
    assert all(found["shapes"] == [[len(outcomes), 2, 3], [2, 3]] for found in outcomes)


def wait_for_rank_1(rank: int, group: GroupCommunicator, directory: Path) -> dict[str, Any]:
    assert isinstance(group, CpuGroup)
    group.all_reduce(torch.ones(8))
    if rank == 1:
        (directory / "rank1.json").write_text("{}")
        os._exit(0)  # in a test of processes, one that fails ends the others
    return after_waiting(group)


def wait_for_nobody(rank: int, group: GroupCommunicator, directory: Path) -> dict[str, Any]:
    assert isinstance(group, CpuGroup)
    group._group.patience = 1
    if rank == 1:
        while not (directory / "rank0.json").exists():
            time.sleep(0.05)
        return {}
    return after_waiting(group)


def after_waiting(group: CpuGroup) -> dict[str, Any]:
    start, messages = time.monotonic(), []
    for _ in range(2):
        try:
            group.all_reduce(torch.ones(8))
        except EngineDeadError as error:
            messages.append(str(error))
    return {"messages": messages, "seconds": time.monotonic() - start}


def test_a_rank_that_ends_is_named_by_those_who_wait_for_it(tmp_path: Path) -> None:
    found = in_processes(wait_for_rank_1, 2, tmp_path)[0]
    assert found["messages"] == ["rank 1 ended while rank 0 waited for its part of a step"] * 2
    assert found["seconds"] < 10


def test_a_rank_that_stands_still_is_waited_for_no_longer_than_patience(tmp_path: Path) -> None:
    found = in_processes(wait_for_nobody, 2, tmp_path)[0]
    assert found["messages"] == ["rank 1 sent rank 0 nothing for 1 s in the middle of a step"] * 2
    assert 1 <= found["seconds"] < 10


def late_for_a_sum_of_many_parts(rank: int, group: GroupCommunicator, _directory: Path) -> dict[str, Any]:
    assert isinstance(group, CpuGroup)
    group._group.patience = 1
    values = (torch.arange(PART_BYTES) // (PART_BYTES // 4) + 1).float()  # four meetings, a number for each
    group.all_reduce(torch.ones(8))
    if rank == 0:
        time.sleep(3)
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append("right" if torch.equal(group.all_reduce(values.clone()), 2 * values) else "wrong")
        except EngineDeadError:
            outcomes.append("refused")
    return {"outcomes": outcomes}


def test_a_rank_that_comes_too_late_never_takes_what_it_finds_for_a_sum(tmp_path: Path) -> None:
    late, gave_up = in_processes(late_for_a_sum_of_many_parts, 2, tmp_path)
    assert gave_up["outcomes"] == ["refused", "refused"]
    assert late["outcomes"] == ["refused", "refused"]


def without_kernels_on_rank_1(rank: int, world_size: int, directory: Path) -> None:
    if rank == 1:
        cpu_group.kernel_library = lambda: None  # type: ignore[assignment]
    run_rank(rank, check_gloo, world_size, directory)


def check_gloo(rank: int, group: GroupCommunicator, _directory: Path) -> dict[str, Any]:
    return {"kind": type(group).__name__, "sum": group.all_reduce(torch.tensor([rank + 1.0])).item()}


def test_all_ranks_use_gloo_where_one_has_no_kernels(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(without_kernels_on_rank_1, (2, tmp_path), nprocs=2)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"kind": "GroupCommunicator", "sum": 3.0}] * 2


def test_signals_reach_a_rank_that_waits(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, wait_long, 2, tmp_path)) for rank in range(2)]
    for each in ranks:
        each.start()
    while not (tmp_path / "waiting").exists():
        time.sleep(0.05)
    os.kill(ranks[0].pid or 0, signal.SIGTERM)
    ranks[0].join(10)
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == -signal.SIGTERM


def wait_long(rank: int, group: GroupCommunicator, directory: Path) -> dict[str, Any]:
    if rank == 1:
        time.sleep(60)
    (directory / "waiting").touch()
    group.all_reduce(torch.ones(8))
    return {}
