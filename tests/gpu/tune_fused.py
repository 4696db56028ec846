"""Times the fused kernels at Qwen3-0.6B's shapes against the torch modules they stand for, and against other settings.

    PYTHONPATH=. python tests/gpu/tune_fused.py [--rep 10]

Each time is the mean of a call inside a CUDA graph, the way the engine runs it, launch gap included. Inputs stay in
the second-level cache from call to call, as they do between the kernels of a layer. About 20 s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from nanovllm_dist.models.layers import norm as torch_norm
from nanovllm_dist.models.layers.activation import silu_and_mul
from nanovllm_dist.models.layers.rotary import Rotation, rotate
from nanovllm_dist.workers.kernels import activation, norm, rope_cache

TOKENS = (1, 16, 256, 2048)
HIDDEN, INTERMEDIATE = 1024, 3072
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128
WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
BLOCK_SIZE, NUM_BLOCKS = 16, 1024
DTYPE, EPS = torch.bfloat16, 1e-6

Case = tuple[int, Callable[[], object], Callable[[], object]]  # bytes moved, the fused call, torch's


@contextmanager
def setting(module: ModuleType, **constants: Any) -> Iterator[str]:
    """The module's constants changed for a while; gives a name for the table."""
    before = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        yield " ".join(f"{name}={value}" for name, value in constants.items())
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(DTYPE)


def norm_case(tokens: int) -> Case:
    x, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)

    def fused() -> object:
        return norm.add_rms_norm(x, residual, weight, EPS)

    return 4 * x.nbytes, fused, lambda: torch_norm.add_rms_norm(x, residual, weight, EPS)


def activation_case(tokens: int) -> Case:
    gate_up = random(tokens, 2 * INTERMEDIATE)
    return gate_up.nbytes * 3 // 2, lambda: activation.silu_mul(gate_up), lambda: silu_and_mul(gate_up)


def rope_case(tokens: int) -> Case:
    qkv, weight = random(tokens, WIDTH), random(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM)
    angles = torch.outer(torch.arange(40960.0), 1e6 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos = torch.cat((angles.cos(), angles.cos()), -1).cuda()
    sin = torch.cat((-angles.sin(), angles.sin()), -1).cuda()
    positions = torch.randint(4096, (tokens,), device="cuda")
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, device="cuda")[:tokens]
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    keys, values = (torch.zeros(shape, device="cuda", dtype=DTYPE).transpose(1, 2) for _ in range(2))

    def fused() -> object:
        return rope_cache.norm_rope_store(
            qkv, positions, cos, sin, weight, EPS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, slots, keys, values
        )

    def plain() -> object:
        rotation = Rotation(cos[positions].unsqueeze(1), sin[positions].unsqueeze(1))
        heads = qkv.unflatten(-1, (-1, HEAD_DIM))
        query_key = rotate(torch_norm.rms_normalize(heads[:, : NUM_HEADS + NUM_KV_HEADS], EPS) * weight, rotation)
        blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        keys[blocks, offsets] = query_key[:, NUM_HEADS:]
        values[blocks, offsets] = heads[:, NUM_HEADS + NUM_KV_HEADS :]
        return query_key

    return 2 * qkv.nbytes, fused, plain


KERNELS = {
    "add_rms_norm": (norm, norm_case, [{"ELEMENTS_PER_THREAD": count} for count in (8, 4, 16)]),
    "silu_mul": (
        activation,
        activation_case,
        [
            {"_FEW_CUT": cut, "_MANY_CUT": cut}
            for cut in ((1024, 8), (1024, 4), (512, 2), (512, 4), (2048, 8), (2048, 4), (4096, 8), (4096, 16))
        ],
    ),
    "norm_rope_store": (
        rope_cache,
        rope_case,
        [
            {"_FEW_HEADS": heads, "_MANY_HEADS": heads, "ELEMENTS_PER_THREAD": count}
            for heads, count in ((8, 4), (4, 4), (2, 4), (16, 4), (32, 4), (8, 8), (16, 8))
        ],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rep", type=int, default=10, help="milliseconds of a measurement, of which there are ten")
    rep = parser.parse_args().rep
    for name, (module, make_case, settings) in KERNELS.items():
        write_row(f"\n{name}", [f"T={tokens}" for tokens in TOKENS])
        cases = [make_case(tokens) for tokens in TOKENS]
        write_row("torch", [timed(size, plain, rep) for size, _, plain in cases])
        for constants in settings:
            with setting(module, **constants) as label:
                write_row(label, [timed(size, fused, rep) for size, fused, _ in cases])


def timed(size: int, call: Callable[[], object], rep: int) -> str:
    """Microseconds of a call and GB/s of the `size` bytes that it moves."""
    time = do_bench_cudagraph(call, rep=rep)
    return f"{1e3 * time:.2f} us {size / time / 1e6:5.0f} GB/s"


def write_row(label: str, cells: list[str]) -> None:
    sys.stdout.write(f"{label:<44}" + "".join(f"{cell:>22}" for cell in cells) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
