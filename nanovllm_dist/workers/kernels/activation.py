"""SiLU of the gates times the rest, in one pass: what `models.layers.activation.silu_and_mul` does, in one launch.

It knows only that a row holds the gates first and as many other features behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options

# Features of a program, and its warps: 8 features of two bytes in a thread are one wide load each of gate and rest
BLOCK = 1024
NUM_WARPS = 4


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 * size], gates first -> silu(gates) * rest, [T, size], new and contiguous.

    Computed in fp32; silu is rounded to the dtype before the product, as torch's two operators do. Rows may be apart
    by any stride; their elements must be adjacent.

    Raises:
        ValueError: an odd number of columns, or a row's elements are not adjacent.
    """
    rows, columns = gate_up.shape
    if columns % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"silu_mul needs an even number of adjacent columns, got {columns} of {gate_up.stride(1)} apart"
        )
    size = columns // 2
    output = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if output.numel():
        grid = (rows, triton.cdiv(size, BLOCK))
        _silu_mul_kernel[grid](
            gate_up,
            output,
            gate_up.stride(0),
            size,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **launch_options(),
        )
    return output


@triton.jit
def _silu_mul_kernel(gate_up_ptr, output_ptr, row_stride, size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gates_ptr = gate_up_ptr + row * row_stride
    stored = tl.load(gates_ptr + columns, mask=inside, other=0.0)
    up = tl.load(gates_ptr + size + columns, mask=inside, other=0.0)
    gate = stored.to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype)
    product = (activated.to(tl.float32) * up.to(tl.float32)).to(stored.dtype)
    tl.store(output_ptr + row * size + columns, product, mask=inside)
