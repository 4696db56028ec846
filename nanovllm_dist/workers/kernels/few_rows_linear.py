"""Linear layers for a few rows, whose time is that of reading the weights: a product, and two that fuse its input.

A program owns a few output features and asks for the whole of their weights at once, into registers: no loop of
loads, no pipeline, and all programs of a multiprocessor together keep far more bytes in flight than its share of the
bandwidth needs. With dependent launch it asks while the kernel before still runs. Products are summed in fp32, in an
order that depends on the input features alone: a row gives the same bits with any other rows, and no atomics.

The fused inputs (SiLU of gates times the rest; residual addition and RMSNorm) are computed by every program anew,
rounded where the kernels `silu_mul` and `add_rms_norm` round: a few KB from the caches instead of a launch.

Weights must not be written by work still queued on the stream (see `dependent_launch`). It knows nothing of layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options

# Above, tensor cores win: every row costs a multiplication per weight and another read of its inputs per program
MAX_ROWS = 8
# Output features of a program, and bytes of a row that a warp reads. A row of inputs is read once for so many features;
# more warps on a row mean more exchange for each result. With a fused input both are shared by more
FEATURES, WARP_BYTES = 4, 2048
FUSED_FEATURES, FUSED_WARP_BYTES = 8, 1024
# Fewer leave some of a Hopper GPU's 114 to 144 multiprocessors with half the work of others
MIN_PROGRAMS = 256

_LOAD_BYTES = 16  # of a thread, the widest there is
_MAX_WARPS = 8  # more leave too few registers to a thread
_MAX_THREAD_BYTES = 256  # of weights in the registers of a thread


def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, K], weight [N, K] contiguous, of one dtype -> x @ weight.T, [R, N] of that dtype; R at most MAX_ROWS.

    Rows of x and of `out` may be apart by any stride. `out` is new if None, and must not overlap x.

    Raises:
        ValueError: too many rows, or shapes, dtypes or strides other than these.
    """
    return _launch(x, weight, out, gated=False)


def few_rows_silu_linear(gate_up: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [R, 2 * K], gates first, weight [N, K] -> (silu(gates) * rest) @ weight.T, [R, N].

    Its input is rounded as by `silu_mul`; else as `few_rows_linear`.
    """
    return _launch(gate_up, weight, out, gated=True)


def few_rows_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, K], residual the same or None, norm_weight [K], weight [N, K] -> (norm(x + residual) @ weight.T, total).

    `total` is x + residual, rounded to the dtype before it is normalised: new and contiguous, because other programs
    still read the residual; without a residual it is x itself. Rounded as by `add_rms_norm`; else as `few_rows_linear`.
    """
    if norm_weight.shape != weight.shape[1:] or norm_weight.dtype != x.dtype or norm_weight.stride(0) != 1:
        raise ValueError(f"norm weight {tuple(norm_weight.shape)} {norm_weight.dtype} for rows of {weight.shape[1]}")
    total = x
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1:
            raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} for x {tuple(x.shape)} {x.dtype}")
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(x, weight, out, gated=False, norm=(residual, norm_weight, eps, total)), total


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    *,
    gated: bool,
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float, torch.Tensor | None] = (None, None, 0.0, None),
) -> torch.Tensor:
    rows, features, size = x.shape[0], *weight.shape
    if out is None:
        out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    _check(x, weight, out, gated)
    if rows == 0 or features == 0:
        return out
    residual, norm_weight, eps, total = norm
    fused = gated or norm_weight is not None
    block_features, num_warps = _cut(features, size * x.element_size(), fused)
    vector = _LOAD_BYTES // x.element_size()
    _few_rows_kernel[(triton.cdiv(features, block_features),)](
        x,
        residual,
        norm_weight,
        weight,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        features,
        ROWS=rows,
        SIZE=size,
        FEATURES=block_features,
        BLOCK=32 * num_warps * vector,
        VECTOR=vector,
        GATED=gated,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, gated: bool) -> None:
    rows, (features, size) = x.shape[0], weight.shape
    problems = []
    if rows > MAX_ROWS or x.shape[1] != size * (1 + gated) or x.stride(1) != 1 or size == 0:
        problems.append(f"x {tuple(x.shape)}, strides {x.stride()}")
    if not weight.is_contiguous() or weight.dtype != x.dtype:
        problems.append(f"weight {tuple(weight.shape)} {weight.dtype}, strides {weight.stride()}")
    if out.shape != (rows, features) or out.dtype != x.dtype or out.stride(1) != 1:
        problems.append(f"out {tuple(out.shape)} {out.dtype}, strides {out.stride()}")
    if problems:
        raise ValueError(
            f"a product of at most {MAX_ROWS} rows with weight {tuple(weight.shape)} in {x.dtype} cannot take: "
            f"{'; '.join(problems)}"
        )


def _cut(features: int, row_bytes: int, fused: bool) -> tuple[int, int]:
    """Output features and warps of a program, both powers of two."""
    wanted, warp_bytes = (FUSED_FEATURES, FUSED_WARP_BYTES) if fused else (FEATURES, WARP_BYTES)
    num_warps = min(triton.next_power_of_2(triton.cdiv(row_bytes, warp_bytes)), _MAX_WARPS)
    room = 32 * _MAX_THREAD_BYTES * num_warps
    while wanted > 1 and (wanted * row_bytes > room or wanted * MIN_PROGRAMS > features):
        wanted //= 2
    return wanted, num_warps


@triton.jit
def _few_rows_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    features,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
    program = tl.program_id(0)
    feature = program * FEATURES + tl.arange(0, FEATURES)
    # Past the end the last feature is read again: no mask on the loads
    feature_ptr = weight_ptr + tl.minimum(feature, features - 1).to(tl.int64)[:, None] * SIZE
    weights: tl.tuple = ()
    norm_weights: tl.tuple = ()
    for start in tl.static_range(0, SIZE, BLOCK):
        weights += (_load_weights(feature_ptr, start, SIZE, BLOCK),)
        if norm_ptr is not None:
            norm_weights += (_load_input(norm_ptr, start, SIZE, BLOCK),)
    if DEPENDENT:
        gdc_wait()

    scales: tl.tuple = ()
    sums: tl.tuple = ()
    for row in tl.static_range(ROWS):
        if norm_ptr is not None:
            place = x_ptr + row * x_stride
            residual_place = residual_ptr if residual_ptr is None else residual_ptr + row * residual_stride
            scales += (_scale(place, residual_place, total_ptr + row * SIZE, program, eps, SIZE, BLOCK),)
        sums += (tl.zeros([FEATURES, BLOCK // VECTOR], dtype=tl.float32),)

    for start in tl.static_range(0, SIZE, BLOCK):
        wide = weights[start // BLOCK].to(tl.float32)
        updated: tl.tuple = ()
        for row in tl.static_range(ROWS):
            place = x_ptr + row * x_stride
            if norm_ptr is not None:
                residual_place = residual_ptr if residual_ptr is None else residual_ptr + row * residual_stride
                total = _total(place, residual_place, start, SIZE, BLOCK)
                normalised = (total.to(tl.float32) * scales[row]).to(total.dtype)
                value = (normalised.to(tl.float32) * norm_weights[start // BLOCK].to(tl.float32)).to(total.dtype)
            elif GATED:
                value = _gated(place, start, SIZE, BLOCK)
            else:
                value = _load_input(place, start, SIZE, BLOCK)
            products = tl.reshape(wide * value.to(tl.float32), [FEATURES, BLOCK // VECTOR, VECTOR])
            updated += (sums[row] + tl.sum(products, axis=2),)
        sums = updated

    for row in tl.static_range(ROWS):
        result = tl.sum(sums[row], axis=1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + feature, result, mask=feature < features)


@triton.jit
def _load_weights(feature_ptr, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[FEATURES, BLOCK] of the weights, zero beyond SIZE. Read once: the caches keep what others read again."""
    column = start + tl.arange(0, BLOCK)[None, :]
    if start + BLOCK <= SIZE:
        return tl.load(feature_ptr + column, eviction_policy="evict_first")
    else:
        return tl.load(feature_ptr + column, mask=column < SIZE, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_input(row_ptr, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[1, BLOCK] of a row, zero beyond SIZE, laid out over threads as the weights are."""
    column = start + tl.arange(0, BLOCK)[None, :]
    if start + BLOCK <= SIZE:
        return tl.load(row_ptr + column)
    else:
        return tl.load(row_ptr + column, mask=column < SIZE, other=0.0)


@triton.jit
def _gated(row_ptr, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gates) * rest, [1, BLOCK]."""
    stored = _load_input(row_ptr, start, SIZE, BLOCK)
    up = _load_input(row_ptr + SIZE, start, SIZE, BLOCK)
    gate = stored.to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(stored.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(stored.dtype)


@triton.jit
def _total(row_ptr, residual_ptr, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """x + residual, [1, BLOCK]."""
    total = _load_input(row_ptr, start, SIZE, BLOCK)
    if residual_ptr is not None:
        residual = _load_input(residual_ptr, start, SIZE, BLOCK)
        total = (total.to(tl.float32) + residual.to(tl.float32)).to(total.dtype)
    return total


@triton.jit
def _scale(row_ptr, residual_ptr, total_ptr, program, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """1 / root mean square of x + residual; the first program also keeps that sum, if there is a residual."""
    squares = tl.zeros([1, BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        total = _total(row_ptr, residual_ptr, start, SIZE, BLOCK)
        wide = total.to(tl.float32)
        squares += wide * wide
        if residual_ptr is not None:
            column = start + tl.arange(0, BLOCK)[None, :]
            tl.store(total_ptr + column, total, mask=(column < SIZE) & (program == 0))
    return tl.math.rsqrt(tl.sum(squares) / SIZE + eps)
