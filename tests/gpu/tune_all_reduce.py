"""Times a sum over all GPUs of this host, by size and way, and prints tables: python tests/gpu/tune_all_reduce.py

Each figure is the median over replays of a CUDA graph of sums of bfloat16, in rank 0: NCCL's, and those of symmetric
memory in one shot and in two; then rows of 5,120 with the residual and norm behind the sum, in a kernel of their own
and in the sum's.
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

from nanovllm_dist.workers.kernels.norm import add_rms_norm
from nanovllm_dist.workers.platform import cuda_sum_norm
from nanovllm_dist.workers.platform.symmetric_memory import ReductionLimits, SymmetricCommunicator, open_communicator

SIZES = [2**10 * kilobytes for kilobytes in (2, 10, 40, 160, 640, 2560, 10240)]
_MOST = 2**24
WAYS = {
    "NCCL": ReductionLimits(0, 0),
    "one shot": ReductionLimits(_MOST, 0),
    "two shots": ReductionLimits(0, _MOST),
}
HIDDEN, EPS = 5120, 1e-6
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 192, 256, 512, 2048, 8192]
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
    time_norms(rank, comm)
    dist.barrier()
    dist.destroy_process_group()


def time_norms(rank: int, comm: SymmetricCommunicator) -> None:
    """The table of sums with norms."""
    comm._limits = ReductionLimits.measured(comm.world_size)
    sums = {}
    for way, limit in (("one shot", 2**20), ("two shots", 0)):
        cuda_sum_norm._ONE_SHOT_BYTES = {comm.world_size: limit}
        sums[way] = cuda_sum_norm.open_sum_norm(comm, HIDDEN, torch.bfloat16, max(ROWS))
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
    for rows in ROWS:
        residual = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")

        def apart() -> None:
            part = comm.reduce_buffer(rows, HIDDEN, torch.bfloat16)  # noqa: B023
            add_rms_norm(comm.all_reduce(part), residual, weight, EPS)  # noqa: B023

        row = [f"apart {microseconds(apart):.1f}"]
        for way, joined in sums.items():
            assert joined is not None
            buffer = joined.buffer(rows)
            if (buffer is None) != (way == "one shot"):
                continue
            part = torch.zeros_like(residual) if buffer is None else buffer

            def join() -> None:
                joined(part, residual, weight, EPS)  # noqa: B023

            row.append(f"{way} {microseconds(join):.1f}")
        if rank == 0:
            print(f"{rows} rows of {HIDDEN}, with norm, us:", ", ".join(row), flush=True)


if __name__ == "__main__":
    ranks = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_rank, (ranks, directory), nprocs=ranks, daemon=True)
