"""Times the sampling kernels on a GPU and prints a table; `--sweep` adds one of chunk sizes and warps.

A program, not a test: `python tests/gpu/tune_sampling.py [--sweep]`. Every figure is microseconds per call inside a
captured graph. Calls rotate over rows of one large pool: from 8 rows on that is more than the cache holds, so that
logits come from memory; a single row is found in the cache, as it is in an engine, where it has just been written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm_dist.workers.kernels import sampling

VOCAB = 151_936
POOL_ROWS = 1024
BATCHES = (1, 8, 64, 256, 512)
SWEEP_BATCHES = (1, 64, 256)
# chunk, warps of shard_statistics, warps of choose
SWEEP = (
    (1024, 1, 4),
    (1024, 2, 8),
    (2048, 1, 4),
    (2048, 2, 8),
    (2048, 4, 4),
    (2048, 4, 8),
    (2048, 8, 16),
    (4096, 2, 8),
    (4096, 4, 8),
    (4096, 8, 16),
)
CALLS = 32
REPLAYS = 15


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def microseconds(call: Callable[[int], object]) -> float:
    """Median time of one of CALLS calls in a graph; `call` gets the number of the call."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(CALLS):
            call(number)
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return sorted(times[3:])[len(times[3:]) // 2]


def measure(pool: Tensor, rows: int) -> tuple[float, float, float]:
    """Microseconds of shard_statistics, of choose, and of one after the other. Every fourth row is greedy."""
    parts = pool.split(rows)
    inv_temperature = torch.full((rows,), 1 / 0.6, device=pool.device)
    inv_temperature[1::4] = 0.0
    uniforms = torch.rand(rows, dtype=torch.float64, device=pool.device)
    out = torch.empty(rows, dtype=torch.int64, device=pool.device)
    shape = (len(parts), 1, rows, sampling.num_chunks(VOCAB), 2)
    statistics = torch.empty(shape, device=pool.device)

    def reduce(number: int) -> None:
        part = number % len(parts)
        sampling.shard_statistics(parts[part], inv_temperature, statistics[part, 0], vocab_local=VOCAB)

    def choose(number: int) -> None:
        part = number % len(parts)
        sampling.choose(
            statistics[part],
            parts[part],
            uniforms,
            inv_temperature,
            out,
            rank=0,
            vocab_start=0,
            vocab_local=VOCAB,
        )

    def both(number: int) -> None:
        reduce(number)
        choose(number)

    for part in range(len(parts)):
        reduce(part)
    return microseconds(reduce), microseconds(choose), microseconds(both)


def row_of_table(pool: Tensor, rows: int) -> str:
    reduce, choose, both = measure(pool, rows)
    speed = rows * VOCAB * pool.element_size() / reduce / 1000
    return f"{rows:5d} {reduce:11.1f} {speed:8.0f} {choose:8.1f} {both:8.1f}"


def main() -> None:
    say(f"{torch.cuda.get_device_name()}, {VOCAB} tokens")
    header = " rows  statistics     GB/s   choose     both"
    for dtype in (torch.bfloat16, torch.float32):
        pool = torch.randn(POOL_ROWS, VOCAB, dtype=dtype, device="cuda") * 3
        say(f"\n{dtype}, chunk {sampling.CHUNK}\n{header}")
        for rows in BATCHES:
            say(row_of_table(pool, rows))
    if "--sweep" in sys.argv:
        pool = torch.randn(POOL_ROWS, VOCAB, dtype=torch.bfloat16, device="cuda") * 3
        say(f"\nchunk warps warps {header}")
        for sampling.CHUNK, sampling._STATISTICS_WARPS, sampling._CHOICE_WARPS in SWEEP:
            for rows in SWEEP_BATCHES:
                config = f"{sampling.CHUNK:5d} {sampling._STATISTICS_WARPS:5d} {sampling._CHOICE_WARPS:5d}"
                say(f"{config} {row_of_table(pool, rows)}")


if __name__ == "__main__":
    main()
