"""Ranks of one host as real processes, in a gloo group and with what the CPU's ranks talk through."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanovllm_dist.models.parallel import GroupCommunicator
from nanovllm_dist.workers.platform.cpu_group import open_group

PATIENCE = 30.0
# (rank, group, a directory that all ranks share) -> what is found, as JSON may hold it
Work = Callable[[int, GroupCommunicator, Path], dict[str, Any]]


def in_processes(work: Work, world_size: int, directory: Path) -> list[dict[str, Any]]:
    """`work` in a process for each rank; what they found, in rank order."""
    torch.multiprocessing.spawn(run_rank, (work, world_size, directory), nprocs=world_size)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def run_rank(rank: int, work: Work, world_size: int, directory: Path) -> None:
    torch.set_num_threads(2)
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    found = work(rank, open_group(store, PATIENCE), directory)
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
