"""Times variants of the paged attention kernels and prints a table: python tests/gpu/tune_attention.py --out FILE.json

Each figure is a median over replays of a CUDA graph of launches that go round over enough layers to leave nothing in
the second-level cache. Decode is quoted as bytes of keys and values read per second, prefill as arithmetic. The default
configuration comes first, and with --flashinfer its decode, tensor cores on, beside it: it may compile for long.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm_dist.workers.kernels import paged_decode, paged_prefill
from nanovllm_dist.workers.kernels.attention_config import DecodeConfig, PrefillConfig
from nanovllm_dist.workers.kernels.paged_decode import DecodeWorkspace, decode_attention
from nanovllm_dist.workers.kernels.paged_prefill import prefill_attention

DTYPE, DIM = torch.bfloat16, 128
# Bytes that a round over the layers reads at least: twice an H200's second-level cache, and then some
_ROUND_BYTES = 160 * 2**20
_MAX_CONTEXT = 40960
_REPLAYS = 7


@dataclass(frozen=True)
class Shape:
    """Decode rows of `shortest`..`longest` keys; for prefill whole prompts of these lengths."""

    name: str
    rows: int
    shortest: int
    longest: int
    heads: int
    kv_heads: int
    sweep: bool = True  # all variants; otherwise only the best ones of the shapes before


DECODES = [
    Shape("256 x 1k, 16/8 heads", 256, 700, 1348, 16, 8),
    Shape("256 x 100..1100, 16/8 heads", 256, 100, 1100, 16, 8),
    Shape("131 x 200..1600, 16/8 heads", 131, 200, 1600, 16, 8, sweep=False),
    Shape("64 x 500..1900, 16/8 heads", 64, 500, 1900, 16, 8, sweep=False),
    Shape("1 x 512, 16/8 heads", 1, 512, 512, 16, 8),
    Shape("256 x 1k, 16/2 heads", 256, 700, 1348, 16, 2, sweep=False),
    Shape("1 x 512, 16/2 heads", 1, 512, 512, 16, 2, sweep=False),
    Shape("256 x 64..2k, 64/8 heads", 256, 64, 2000, 64, 8, sweep=False),
    Shape("16 x 1k, 16/8 heads", 16, 700, 1348, 16, 8, sweep=False),
    Shape("512 x 300, 16/8 heads", 512, 100, 500, 16, 8, sweep=False),
    Shape("1 x 40k, 16/8 heads", 1, 40000, 40000, 16, 8, sweep=False),
]
PREFILLS = [Shape("16 x 1k prompts, 16/8 heads", 16, 600, 1400, 16, 8), Shape("1 x 8k, 16/8", 1, 8192, 8192, 16, 8)]
DECODE_VARIANTS = [
    paged_decode.config_for(DTYPE, 256, 8),
    paged_decode.config_for(DTYPE, 1, 8),
    paged_decode.config_for(DTYPE, 32, 8),
    paged_decode.config_for(DTYPE, 64, 8),
    DecodeConfig(2048, 16, tile=32, num_warps=2, num_stages=3),
    DecodeConfig(2048, 16, tile=32, num_warps=2, num_stages=4),
    DecodeConfig(2048, 16, tile=32, num_warps=4, num_stages=3),
    DecodeConfig(2048, 16, tile=64, num_warps=4, num_stages=2),
    DecodeConfig(1024, 16, tile=32, num_warps=2, num_stages=3),
    DecodeConfig(512, 16, tile=64, num_warps=4, num_stages=3),
    DecodeConfig(256, 16, tile=64, num_warps=4, num_stages=3),
    DecodeConfig(128, 16, tile=32, num_warps=2, num_stages=3),
    DecodeConfig(64, 8, tile=64, num_warps=4, num_stages=3),
]
PREFILL_VARIANTS = [
    paged_prefill.default_config(DTYPE),
    PrefillConfig(queries=128, tile=64, num_warps=8, num_stages=2),
    PrefillConfig(queries=64, tile=64, num_warps=4, num_stages=2),
    PrefillConfig(queries=64, tile=64, num_warps=4, num_stages=3),
    PrefillConfig(queries=128, tile=128, num_warps=8, num_stages=2),
    PrefillConfig(queries=128, tile=32, num_warps=4, num_stages=3),
]


class Inputs:
    """Layers of one shape, physically [blocks, kv_heads, block_size, head_dim]; logically as the kernels take them."""

    def __init__(self, shape: Shape, block_size: int) -> None:
        rng, generator = random.Random(0), torch.Generator("cuda").manual_seed(0)
        self.contexts = [rng.randint(shape.shortest, shape.longest) for _ in range(shape.rows)]
        counts = [-(-context // block_size) for context in self.contexts]
        self.blocks = list(range(sum(counts)))
        rng.shuffle(self.blocks)
        tables = torch.zeros(shape.rows, -(-_MAX_CONTEXT // block_size), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(counts):
            tables[row, :count] = torch.tensor(self.blocks[taken : taken + count])
            taken += count
        self.block_counts = counts
        self.block_tables = tables.cuda()
        self.context_lens = torch.tensor(self.contexts, dtype=torch.int32, device="cuda")
        self.kv_bytes = 2 * sum(self.contexts) * shape.kv_heads * DIM * DTYPE.itemsize
        physical = (len(self.blocks), shape.kv_heads, block_size, DIM)
        self.layers = [
            tuple(torch.randn(physical, generator=generator, dtype=DTYPE, device="cuda") for _ in range(2))
            for _ in range(max(2, -(-_ROUND_BYTES // self.kv_bytes)))
        ]

    def logical(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_blocks, block_size, kv_heads, head_dim] of a layer, going round."""
        keys, values = self.layers[layer % len(self.layers)]
        return keys.transpose(1, 2), values.transpose(1, 2)


def microseconds(launch: Callable[[int], object], launches: int) -> float:
    """Median time of one launch(i) within a graph of `launches` of them."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    times = []
    for _ in range(_REPLAYS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times[1:])


def time_decode(shape: Shape, inputs: Inputs, config: DecodeConfig) -> dict[str, Any]:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    workspace = DecodeWorkspace(
        shape.rows, shape.heads, shape.kv_heads, DIM, _MAX_CONTEXT, processors, config, torch.device("cuda")
    )
    query = torch.randn(shape.rows, shape.heads, DIM, dtype=DTYPE, device="cuda")
    out = torch.empty_like(query)
    tables, contexts = inputs.block_tables, inputs.context_lens
    prepare = microseconds(lambda _: workspace.prepare(contexts), 20)

    def launch(layer: int) -> None:
        decode_attention(query, *inputs.logical(layer), tables, contexts, DIM**-0.5, workspace, out)

    return {"us": microseconds(launch, launches_for(inputs)), "prepare_us": prepare}


def time_flashinfer(shape: Shape, inputs: Inputs, block_size: int) -> dict[str, Any]:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), "HND", use_tensor_cores=True
    )
    ends = torch.tensor([0, *inputs.block_counts], dtype=torch.int32).cumsum(0).to(torch.int32)
    last = torch.tensor([(context - 1) % block_size + 1 for context in inputs.contexts], dtype=torch.int32)
    pages = torch.tensor(inputs.blocks, dtype=torch.int32).cuda()
    wrapper.plan(
        ends.cuda(),
        pages,
        last.cuda(),
        shape.heads,
        shape.kv_heads,
        DIM,
        block_size,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    query = torch.randn(shape.rows, shape.heads, DIM, dtype=DTYPE, device="cuda")
    out = torch.empty_like(query)
    layers = inputs.layers

    def launch(layer: int) -> None:
        wrapper.run(query, layers[layer % len(layers)], out=out)

    return {"us": microseconds(launch, launches_for(inputs))}


def time_prefill(shape: Shape, inputs: Inputs, config: PrefillConfig) -> dict[str, Any]:
    starts = torch.tensor([0, *inputs.contexts], device="cuda").cumsum(0).to(torch.int32)
    query = torch.randn(sum(inputs.contexts), shape.heads, DIM, dtype=DTYPE, device="cuda")
    out = torch.empty_like(query)
    tables, contexts = inputs.block_tables, inputs.context_lens

    def launch(layer: int) -> None:
        prefill_attention(query, *inputs.logical(layer), tables, contexts, starts, DIM**-0.5, out, config)

    us = microseconds(launch, 4)
    operations = sum(2 * shape.heads * DIM * context * context for context in inputs.contexts)
    return {"us": us, "tflops": operations / us / 1e6}


def launches_for(inputs: Inputs) -> int:
    """Enough to go round and to hide a graph's start, few enough to be quick."""
    return max(4, len(inputs.layers), min(32, 2**31 // inputs.kv_bytes))


def attempt(kind: str, shape: Shape, config: Any, work: Callable[[], dict[str, Any]], roof: float, nbytes: int) -> Any:
    """Run, print a line, and return a record; a variant that cannot run is a line too."""
    described = asdict(config) if config is not None else {}
    record: dict[str, Any] = {"kind": kind, "shape": shape.name, "config": described}
    try:
        record |= work()
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:200]
        print(f"{kind:10} {shape.name:28} {record['error']}  {described}", flush=True)
        return record
    record["gb_per_s"] = nbytes / record["us"] / 1e3
    record["share"] = record["gb_per_s"] * 1e9 / roof
    speed = f"{record['tflops']:6.0f} TFLOP/s" if "tflops" in record else f"{record['gb_per_s']:6.0f} GB/s"
    extra = f" prepare {record['prepare_us']:.1f}" if "prepare_us" in record else ""
    parts = " ".join(f"{name}={value}" for name, value in described.items())
    print(
        f"{kind:10} {shape.name:28} {record['us']:9.2f} us {speed} {record['share']:6.1%}{extra}  {parts}", flush=True
    )
    return record


def decode_records(options: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    variants = DECODE_VARIANTS
    for shape in DECODES:
        inputs = Inputs(shape, options.block_size)
        chosen = variants if shape.sweep else best(records)
        for config in chosen:
            if time.monotonic() < deadline:
                work = partial(time_decode, shape, inputs, config)
                records.append(attempt("decode", shape, config, work, options.bandwidth, inputs.kv_bytes))
        if options.flashinfer and time.monotonic() < deadline:
            rival = partial(time_flashinfer, shape, inputs, options.block_size)
            records.append(attempt("flashinfer", shape, None, rival, options.bandwidth, inputs.kv_bytes))
    return records


def best(records: list[dict[str, Any]]) -> list[DecodeConfig]:
    """The default and the quickest variants of each swept shape."""
    chosen = [DECODE_VARIANTS[0]]
    for shape in (shape for shape in DECODES if shape.sweep):
        timed = [r for r in records if r["shape"] == shape.name and r["kind"] == "decode" and "us" in r]
        for record in sorted(timed, key=lambda record: record["us"])[:2]:
            config = replace(DECODE_VARIANTS[0], **record["config"])
            if config not in chosen:
                chosen.append(config)
    return chosen


def prefill_records(options: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    records = []
    for shape in PREFILLS:
        inputs = Inputs(shape, options.block_size)
        for config in PREFILL_VARIANTS:
            if time.monotonic() < deadline:
                work = partial(time_prefill, shape, inputs, config)
                records.append(attempt("prefill", shape, config, work, options.bandwidth, inputs.kv_bytes))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write all records there, as JSON")
    parser.add_argument("--seconds", type=float, default=85.0, help="start no variant after so long")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, default=3.09e12, help="bytes per second that 100%% stands for")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer's decode beside it")
    options = parser.parse_args()
    begun = time.monotonic()
    print(torch.cuda.get_device_name(0), flush=True)
    records = []
    if options.only != "decode":
        share = 1.0 if options.only else 0.25
        records += prefill_records(options, begun + share * options.seconds)
    if options.only != "prefill":
        records += decode_records(options, begun + options.seconds)
    if options.out:
        options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(0), "records": records}, indent=1))


if __name__ == "__main__":
    main()
