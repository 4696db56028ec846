"""Times the product of a few rows against cuBLAS, cut in different ways, and a layer's chain of kernels around it.

    PYTHONPATH=. python tests/gpu/tune_few_rows.py [--rows 1 2 4] [--small] [--chain-only]

Everything runs in CUDA graphs over many copies of the weights, more than twice the second-level cache, so that weights
come from memory as they do in a model. First Qwen3-0.6B's layer without attention, x 28: microseconds of a layer with
cuBLAS and with this product. Then each product: microseconds and GB/s of the weights, for F.linear and for some
(features of a program, warps), the cut that the module would choose in brackets, the best marked. About 30 s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton

from nanovllm_dist.workers.kernels import dependent_launch
from nanovllm_dist.workers.kernels import few_rows_linear as few
from nanovllm_dist.workers.kernels.activation import silu_mul
from nanovllm_dist.workers.kernels.norm import add_rms_norm
from nanovllm_dist.workers.kernels.rope_cache import norm_rope_store

SMALL = {"qkv": (4096, 1024), "gate_up": (6144, 1024), "o": (1024, 2048), "down": (1024, 3072)}
LARGE = {"qkv": (2560, 5120), "gate_up": (12800, 5120), "o": (5120, 2048), "down": (5120, 6400)}
CUTS = [(features, warps) for warps in (1, 2, 4, 8) for features in (1, 2, 4, 8, 16)]
MANY_CUTS, FEW_CUTS = 5, 3  # of them for one row and for more, those nearest to the module's own
DISTINCT_BYTES, MIN_CALLS, REPEATS = 120_000_000, 24, 12
DTYPE, EPS, LAYERS = torch.bfloat16, 1e-6, 28
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128

Cut = tuple[int, int]
module_cut = few._cut


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE).mul(shape[-1] ** -0.5)


def timed(run: Callable[[], object], calls: int) -> float:
    """Microseconds of one of the `calls` that `run` makes, in a graph; the median of REPEATS."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return 1e3 * times[REPEATS // 2] / calls


class Product(NamedTuple):
    """One shape at one number of rows."""

    name: str
    rows: int
    features: int
    size: int

    @property
    def own_cut(self) -> Cut:
        return module_cut(self.features, 2 * self.size)

    def cuts(self) -> list[Cut]:
        def thread_bytes(cut: Cut) -> float:
            return cut[0] * self.size * 2 / (32 * cut[1])

        def distance(cut: Cut) -> float:
            return abs(cut[0].bit_length() - own[0].bit_length()) + abs(cut[1].bit_length() - own[1].bit_length())

        own = self.own_cut
        fitting = [
            cut for cut in CUTS if 48 <= thread_bytes(cut) <= 330 and cut[1] * 256 < 2 * self.size
            and self.features >= 128 * cut[0]
        ]  # fmt: skip
        fitting = sorted({own, *fitting}, key=distance)
        return sorted(fitting[: MANY_CUTS if self.rows == 1 else FEW_CUTS])

    def call(self, weight: torch.Tensor) -> partial[torch.Tensor]:
        return partial(few.few_rows_linear, random(self.rows, self.size), weight)


class Warmup:
    """Stands for a kernel, and compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return partial(self._kernel.warmup, grid=grid)


def compile_all(products: list[Product]) -> None:
    """Every cut of every product, on all processors at once."""
    with (
        ThreadPoolExecutor(16) as pool,
        attribute(few, "_few_rows_kernel", Warmup(few._few_rows_kernel)),
        triton.AsyncCompileMode(pool),
    ):
        for product in products:
            call = product.call(torch.empty(product.features, product.size, device="cuda", dtype=DTYPE))
            for cut in product.cuts():
                with attribute(few, "_cut", lambda *_, cut=cut: cut):
                    call()


def tune(product: Product, weights: list[torch.Tensor]) -> None:
    """A line of times for one product."""
    calls = [product.call(weight) for weight in weights] * -(-MIN_CALLS // len(weights))
    linear = [partial(F.linear, *call.args) for call in calls]
    times = {"cuBLAS": timed(lambda: [call() for call in linear], len(calls))}
    for cut in product.cuts():
        with attribute(few, "_cut", lambda *_, cut=cut: cut):
            label = f"{cut[0]}/{cut[1]}"
            times[f"[{label}]" if cut == product.own_cut else label] = timed(
                lambda: [call() for call in calls], len(calls)
            )
    best, size = min(times.values()), weights[0].nbytes
    title = f"{product.name} {product.features}x{product.size} R={product.rows}"
    cells = [f"{'*' if time == best else ''}{label} {time:.2f}" for label, time in times.items()]
    write(f"{title:<32} best {size / best / 1e3:5.0f} GB/s, us: {'  '.join(cells)}")


def tune_products(shapes: dict[str, tuple[int, int]], rows: list[int]) -> None:
    products = [Product(name, count, *shape) for name, shape in shapes.items() for count in rows]
    compile_all(products)
    for name, (features, size) in shapes.items():
        weights = [random(features, size) for _ in range(max(2, -(-DISTINCT_BYTES // (2 * features * size))))]
        torch.cuda.synchronize()
        for product in products:
            if product.name == name:
                tune(product, weights)


class Chain:
    """Qwen3-0.6B's layers without attention: the rotated queries go straight to the output projection."""

    def __init__(self, rows: int) -> None:
        self.start = random(rows, 1024) * 32
        self.weights = [{name: random(*shape) for name, shape in SMALL.items()} for _ in range(LAYERS)]
        self.norm_weight = random(1024) * 32
        self.head_weight = random(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM)
        self.cos, self.sin = torch.randn(2, 128, HEAD_DIM, device="cuda").unbind()
        self.positions = torch.arange(rows, device="cuda")
        self.keys, self.values = torch.zeros(2, 4, 64, NUM_KV_HEADS, HEAD_DIM, device="cuda", dtype=DTYPE).unbind()

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        place = (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, self.positions, self.keys, self.values)
        return norm_rope_store(
            qkv, self.positions, self.cos, self.sin, self.head_weight, EPS, *place
        ).flatten(1)  # fmt: skip

    def run(self, linear: Callable[..., torch.Tensor]) -> torch.Tensor:
        x, residual = self.start.clone(), None
        for weights in self.weights:
            normed, residual = add_rms_norm(x, residual, self.norm_weight, EPS)
            x = linear(self.attend(linear(normed, weights["qkv"])), weights["o"])
            normed, residual = add_rms_norm(x, residual, self.norm_weight, EPS)
            x = linear(silu_mul(linear(normed, weights["gate_up"])), weights["down"])
        return x


def tune_chain(rows: int) -> None:
    chain = Chain(rows)
    torch.cuda.synchronize()
    choices: dict[str, Callable[..., torch.Tensor]] = {"cuBLAS": F.linear, "few rows": few.few_rows_linear}
    times = {}
    for label, linear in choices.items():
        for enabled in (False, True):
            with attribute(dependent_launch, "ENABLED", enabled):
                times[label, enabled] = timed(partial(chain.run, linear), LAYERS)
    best = min(times.values())
    write(f"\nlayer, R={rows}: us after one another, us with dependent launch")
    for label in choices:
        cells = [f"{times[label, on]:8.2f}{'*' if times[label, on] == best else ' '}" for on in (False, True)]
        write(f"  {label:<12}{''.join(cells)}")


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--small", action="store_true", help="without the shapes of Qwen3-32B over four ranks")
    parser.add_argument("--chain-only", action="store_true")
    options = parser.parse_args()
    with torch.inference_mode():
        for rows in options.rows:
            tune_chain(rows)
        if not options.chain_only:
            write("\nproducts, by features / warps of a program; the module's choice in [ ]")
            for shapes in (SMALL,) if options.small else (SMALL, LARGE):
                tune_products(shapes, options.rows)


if __name__ == "__main__":
    main()
