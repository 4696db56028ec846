"""SiLU of the gates times the rest, in one pass: what `models.layers.activation.silu_and_mul` does, in one launch.

It knows only that a row holds the gates first and as many other features behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options
from nanovllm_dist.workers.kernels.norm import row_scale

# Up to so many rows there are several programs for each, to occupy the processors
FEW_ROWS = 256
# Features of a program, and its warps
_FEW_CUT, _MANY_CUT = (1024, 8), (4096, 8)


def silu_mul(gate_up: torch.Tensor, hidden: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    """gate_up [T, 2 * size], gates first -> silu(gates) * rest, [T, size], new and contiguous.

    With `hidden` [T, any size], of one dtype with gate_up, all of row t of gate_up is first divided by the root mean
    square of row t of `hidden`, `eps` added under the root: what a norm before the product would have done after it.

    Computed in fp32; silu is rounded to the dtype before the product, as torch's two operators do. Rows may be apart
    by any stride; their elements must be adjacent.

    Raises:
        ValueError: an odd number of columns, a row's elements are not adjacent, or `hidden` does not fit gate_up.
    """
    rows, columns = gate_up.shape
    if columns % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"silu_mul needs an even number of adjacent columns, got {columns} of {gate_up.stride(1)} apart"
        )
    if hidden is not None and (len(hidden) != rows or hidden.stride(1) != 1 or hidden.dtype != gate_up.dtype):
        raise ValueError(f"silu_mul of {rows} rows of {gate_up.dtype} by hidden {tuple(hidden.shape)} {hidden.dtype}")
    size = columns // 2
    output = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if output.numel():
        block, num_warps = _FEW_CUT if rows <= FEW_ROWS else _MANY_CUT
        width = 1 if hidden is None else hidden.shape[1]
        _silu_mul_kernel[(rows, triton.cdiv(size, block))](
            gate_up,
            hidden,
            output,
            gate_up.stride(0),
            0 if hidden is None else hidden.stride(0),
            size,
            eps,
            WIDTH=width,
            PADDED_WIDTH=triton.next_power_of_2(width),
            BLOCK=block,
            num_warps=num_warps,
            **launch_options(),
        )
    return output


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,
    hidden_ptr,
    output_ptr,
    row_stride,
    hidden_stride,
    size,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gates_ptr = gate_up_ptr + row * row_stride
    stored = tl.load(gates_ptr + columns, mask=inside, other=0.0)
    up = tl.load(gates_ptr + size + columns, mask=inside, other=0.0).to(tl.float32)
    gate = stored.to(tl.float32)
    if hidden_ptr is not None:
        scale = row_scale(hidden_ptr + row * hidden_stride, eps, WIDTH, PADDED_WIDTH)
        gate *= scale
        up *= scale
    activated = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype)
    product = (activated.to(tl.float32) * up).to(stored.dtype)
    tl.store(output_ptr + row * size + columns, product, mask=inside)
