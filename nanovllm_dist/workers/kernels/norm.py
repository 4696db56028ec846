"""Residual addition and RMSNorm in one pass over the rows: what `models.layers.norm.add_rms_norm` does, in one launch.

A program owns a row and keeps it in registers, so a row is read once and its result does not depend on the other
rows. It knows nothing of layers; weights come in as tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options

# Elements of a row that a thread holds, unless that needs more than 16 warps; 8 of two bytes are one wide load
ELEMENTS_PER_THREAD = 8


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, size], residual the same or None, weight [size], all of one dtype -> (normed [T, size], total [T, size]).

    `total` is x + residual, rounded to the dtype before it is normalised. It is written over `residual`, which is
    what comes back as `total`; without a residual `total` is x itself. `normed` is new and contiguous. Rows of x and
    of the residual may be apart by any stride; their elements must be adjacent. Any size that fits registers: 16,384.

    Raises:
        ValueError: a row's elements are not adjacent, or shapes or dtypes differ.
    """
    rows, size = x.shape
    total = x if residual is None else residual
    if x.stride(1) != 1 or total.stride(1) != 1 or weight.stride(0) != 1:
        raise ValueError("add_rms_norm needs rows of adjacent elements")
    if total.shape != x.shape or weight.shape != (size,) or not x.dtype == total.dtype == weight.dtype:
        raise ValueError(
            f"add_rms_norm of x {tuple(x.shape)} {x.dtype}, residual {tuple(total.shape)} {total.dtype}, "
            f"weight {tuple(weight.shape)} {weight.dtype}: shapes and dtypes must agree"
        )
    normed = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows == 0:
        return normed, total
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        normed,
        x.stride(0),
        total.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        num_warps=min(max(block // (32 * ELEMENTS_PER_THREAD), 1), 16),
        **launch_options(),
    )
    return normed, total


@triton.jit
def inverse_rms(row, eps, SIZE: tl.constexpr):
    """One over the root mean square of a row's SIZE elements, in fp32; padding of `row` is zero."""
    wide = row.to(tl.float32)
    return tl.math.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)


@triton.jit
def row_scale(row_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`inverse_rms` of SIZE elements at `row_ptr`, for kernels that norm what was made of a row that was not normed."""
    column = tl.arange(0, BLOCK)
    return inverse_rms(tl.load(row_ptr + column, mask=column < SIZE, other=0.0), eps, SIZE)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    # Asked for first: it does not depend on the statistics, so its latency hides behind them
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if DEPENDENT:
        gdc_wait()
    total = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    dtype = total.dtype
    if residual_ptr is not None:
        place = residual_ptr + row * residual_stride + columns
        residual = tl.load(place, mask=inside, other=0.0)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(place, total, mask=inside)
    wide = total.to(tl.float32)
    normalised = (wide * inverse_rms(wide, eps, SIZE)).to(dtype)
    normed = (normalised.to(tl.float32) * weight.to(tl.float32)).to(dtype)
    tl.store(normed_ptr + row * SIZE + columns, normed, mask=inside)
