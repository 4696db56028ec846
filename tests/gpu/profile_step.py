"""Where the time of one rank's steps goes: python tests/gpu/profile_step.py MODEL [--rows 1 256] [--context 1024]

Runs a worker's model in this process on random weights: decode steps by graph back to back, the same under the profiler
with time per kernel, and prefill steps. The host's own time to start a step is printed beside.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.parallel import SingleRank
from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.wire.messages import NewRow, Step, pack_ints
from nanovllm_dist.workers.model_runner import ModelRunner
from nanovllm_dist.workers.platform import get_platform
from nanovllm_dist.workers.running_step import RunningStep

_STEPS = 40


class Steps:
    """Feeds one ModelRunner."""

    def __init__(self, model: str, rows: int, context: int, device: str) -> None:
        config = EngineConfig(
            model=model, load_format="dummy", dtype="bfloat16", device=device, max_num_seqs=max(rows, 2),
            max_model_len=max(4096, context + 512),
        )  # fmt: skip
        self.config, model_config = resolve_config(config, progress=False)
        platform = get_platform(self.config.device)
        target = platform.open_device(0, self.config)
        began = time.perf_counter()
        self.runner = ModelRunner(self.config, model_config, platform, SingleRank(), target)
        self.runner.load(lambda done, total: None)
        loaded = time.perf_counter()
        blocks = self.runner.measure_blocks()
        print(f"load {loaded - began:.2f} s, profile {time.perf_counter() - loaded:.2f} s, {blocks} blocks")
        self.runner.allocate(blocks)
        self.rows, self.context, self.number = rows, context, 0

    def start(self, slots: list[int], counts: list[int], new_rows: list[NewRow]) -> RunningStep:
        """Start one step."""
        step = Step(0, self.number, pack_ints(slots), pack_ints(counts), b"", b"", new_rows)
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
            count = -(-(length + 4 * _STEPS) // size)
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

    def decode(self, count: int) -> tuple[float, float]:
        """Seconds per step back to back, two in flight, and seconds of the host per start."""
        slots, ones = list(range(self.rows)), [1] * self.rows
        host, last = [], None
        torch.cuda.synchronize()
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


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for rows in options.rows:
        steps = Steps(options.model, rows, options.context, options.device)
        steps.fill()
        began = time.perf_counter()
        steps.decode(1)
        print(f"first decode, recorded: {time.perf_counter() - began:.2f} s")
        steps.decode(4)
        times = sorted(steps.decode(_STEPS // 4) for _ in range(4))
        step, host = times[1]
        print(f"{rows} rows: {1e3 * step:.3f} ms a step, {rows / step:,.0f} tok/s, host {1e6 * host:.0f} us")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            steps.decode(4)
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=60)
        kept = [" ".join(line.split()) for line in table.splitlines() if "%" in line]
        print("\n".join(line for line in kept if line))
        del steps
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
