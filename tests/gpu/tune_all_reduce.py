"""Times a sum over all GPUs of this host, by size and way, and prints a table: python tests/gpu/tune_all_reduce.py

Each figure is the median over replays of a CUDA graph of sums of bfloat16, in rank 0: NCCL's, and those of symmetric
memory in one shot and in two.
"""

# ruff: noqa: T201

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nanovllm_dist.workers.platform.symmetric_memory import ReductionLimits, SymmetricCommunicator, open_communicator

SIZES = [2**10 * kilobytes for kilobytes in (2, 10, 40, 160, 640, 2560, 10240)]
_MOST = 2**24
WAYS = {
    "NCCL": ReductionLimits(0, 0),
    "one shot": ReductionLimits(_MOST, 0),
    "two shots": ReductionLimits(0, _MOST),
}
_IN_A_GRAPH, _REPLAYS = 20, 9


def microseconds(launch: Callable[[], object]) -> float:
    """Median time of one launch in a graph of several."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_IN_A_GRAPH):
            launch()
    times = []
    for _ in range(_REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / _IN_A_GRAPH)
    return statistics.median(times[1:])


def run_rank(rank: int, world_size: int, directory: str) -> None:
    """One process of the group."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(directory, "store")), world_size)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    comm = open_communicator(device, ReductionLimits(_MOST, _MOST))
    if not isinstance(comm, SymmetricCommunicator):
        raise SystemExit("symmetric memory cannot be used here")
    for size in SIZES:
        row = []
        for way, limits in WAYS.items():
            comm._limits = limits

            def reduce() -> None:
                part = comm.reduce_buffer(1, size // 2, torch.bfloat16)  # noqa: B023
                comm.all_reduce(part)

            row.append(f"{way} {microseconds(reduce):.1f}")
        if rank == 0:
            print(f"{size / 1024:.0f} KB, us:", ", ".join(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_rank, (ranks, directory), nprocs=ranks)
