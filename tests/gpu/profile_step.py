"""Where the time of a rank's steps goes: python tests/gpu/profile_step.py MODEL [--tp 1] [--rows 1 256] [--context 999]

Runs the workers' model on random weights, a process a rank: decode steps by graph back to back, the same under the
profiler with time per kernel, and prefill steps. The host's own time to start a step is printed beside. Rank 0 prints.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, pack_ints
from nanovllm_dist.workers.model_runner import ModelRunner
from nanovllm_dist.workers.platform import get_platform
from nanovllm_dist.workers.running_step import RunningStep

_STEPS = 40


class Steps:
    """Feeds the ModelRunner of one rank."""

    def __init__(self, options: argparse.Namespace, rank: int, store: dist.Store | None) -> None:
        rows, context = max(options.rows), options.context
        config = EngineConfig(
            model=options.model, load_format="dummy", dtype="bfloat16", device=options.device,
            tensor_parallel_size=options.tp, max_num_seqs=max(rows, 2), max_model_len=max(4096, context + 512),
            kv_cache_memory=options.kv_cache_memory,
        )  # fmt: skip
        self.config, model_config = resolve_config(config, progress=False)
        self.platform = get_platform(self.config.device)
        target = self.platform.open_device(rank, self.config)
        comm = self.platform.connect(rank, self.config, store)
        began = time.perf_counter()
        self.runner = ModelRunner(self.config, model_config, self.platform, comm, target)
        self.runner.load(lambda done, total: None)
        loaded = time.perf_counter()
        blocks = self.runner.measure_blocks()
        print(f"load {loaded - began:.2f} s, profile {time.perf_counter() - loaded:.2f} s, {blocks} blocks")
        self.runner.allocate(blocks)
        self.rows, self.context, self.number, self.row_counts = rows, context, 0, options.rows

    def start(self, slots: list[int], counts: list[int], new_rows: list[NewRow]) -> RunningStep:
        """Start one step."""
        step = Step(0, self.number, pack_ints(slots), pack_ints(counts), b"", b"", new_rows, traced=True)
        self.number += 1
        running = self.runner.start(step)
        assert running is not None
        return running

    def fill(self) -> None:
        """Prefill all rows, of lengths around the context, and time it."""
        rng, size = random.Random(0), self.config.block_size
        first, budget = 1, self.config.max_num_batched_tokens
        waiting = []
        for slot in range(self.rows):
            length = rng.randint(self.context * 7 // 10, self.context * 13 // 10)
            count = -(-(length + 2 * _STEPS * len(self.row_counts)) // size)
            tokens = pack_ints([rng.randrange(1000) for _ in range(length)])
            blocks = pack_ints(range(first, first + count))
            params = SamplingParams(temperature=0.6)
            waiting.append((length, NewRow(slot, tokens, length, 0, 0, blocks, slot, params, [])))
            first += count
        while waiting:
            taken, total = [], 0
            while waiting and (not taken or total + waiting[0][0] <= budget):
                taken.append(waiting.pop(0))
                total += taken[-1][0]
            began = time.perf_counter()
            running = self.start([row.slot for _, row in taken], [n for n, _ in taken], [row for _, row in taken])
            started = time.perf_counter()
            running.result()
            if len(waiting) < 9:
                done = time.perf_counter()
                print(f"prefill {total} tokens: {1e3 * (done - began):.2f} ms, host {1e3 * (started - began):.2f} ms")

    def decode(self, count: int, rows: int) -> tuple[float, float]:
        """Seconds per step of so many rows back to back, two in flight, and seconds of the host per start."""
        slots, ones = list(range(rows)), [1] * rows
        host, last = [], None
        self.platform.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            at = time.perf_counter()
            running = self.start(slots, ones, [])
            host.append(time.perf_counter() - at)
            if last is not None:
                last.result()
            last = running
        assert last is not None
        last.result()
        return (time.perf_counter() - began) / count, statistics.median(host)


def run_rank(rank: int, options: argparse.Namespace, directory: str) -> None:
    """One process of the group."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
        run(rank, options, directory)


def run(rank: int, options: argparse.Namespace, directory: str) -> None:
    """Its steps."""
    store = dist.FileStore(str(Path(directory, "store")), options.tp) if options.tp > 1 else None
    steps = Steps(options, rank, store)
    steps.fill()
    for rows in options.rows:
        began = time.perf_counter()
        steps.decode(1, rows)
        print(f"first decode, recorded: {time.perf_counter() - began:.2f} s")
        steps.decode(4, rows)
        times = sorted(steps.decode(_STEPS // 4, rows) for _ in range(4))
        step, host = times[1]
        print(f"{rows} rows: {1e3 * step:.3f} ms a step, {rows / step:,.0f} tok/s, host {1e6 * host:.0f} us")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            steps.decode(4, rows)
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60)
        kept = [" ".join(line.split()) for line in table.splitlines() if "%" in line]
        print("\n".join(line for line in kept if line), flush=True)
    if store is not None:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kv-cache-memory", type=int, default=0, help="bytes; as much as there is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_rank, (options, directory), nprocs=options.tp, daemon=True)


if __name__ == "__main__":
    main()
