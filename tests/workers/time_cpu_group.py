"""What a sum between CPU ranks takes, through gloo and through shared memory.

Not a test: `OMP_NUM_THREADS=1 python tests/workers/time_cpu_group.py RANKS` prints the table of
docs/performance.md for so many ranks, of one thread each.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rank_processes import in_processes

from nanovllm_dist.models.parallel import GroupCommunicator

COUNTS = {576: 300, 4_608: 300, 36_864: 300, 294_912: 20, 1_179_648: 20}


def time_sums(_rank: int, group: GroupCommunicator, _directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for count, times in COUNTS.items():
        part = torch.ones(count, dtype=torch.bfloat16)
        for name, comm in (("gloo", GroupCommunicator()), (type(group).__name__, group)):
            comm.all_reduce(part)
            taken = []
            for _ in range(times):
                start = time.perf_counter()
                comm.all_reduce(part)
                taken.append(time.perf_counter() - start)
            found[f"{count:>9,} {name}"] = f"{statistics.median(taken) * 1e6:8.1f} us"
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for case, taken in in_processes(time_sums, int(sys.argv[1]), Path(directory))[0].items():
            sys.stdout.write(f"{case} {taken}\n")
