"""A linear layer for a few rows, whose time is that of reading the weights.

A program owns a few output features and asks for the whole of their weights at once, into registers: no loop of
loads, no pipeline, and all programs of a multiprocessor together keep far more bytes in flight than its share of the
bandwidth needs. With dependent launch it asks while the kernel before still runs. Products are summed in fp32, in an
order that depends on the input features alone: a row gives the same bits with any other rows, and no atomics.

On an H100, in bf16, one row takes 3.3, 4.6, 2.2 and 2.9 us for the products qkv, gate_up, o and down of a hidden size
of 1,024, where cuBLAS takes 5.8, 7.1, 5.8 and 6.9. Such a layer without its attention takes 16.4 us instead of 29.6
for one row, 19.2 instead of 29.8 for two, 22.7 instead of 30.3 for four: cuBLAS asks nothing for more rows, this does.

The same program can make the gates and what they are multiplied with, and so the activation between two products
needs no launch; and a norm before the product, but for its weight, as it reads the whole row anyway.

Weights must not be written by work still queued on the stream (see `dependent_launch`). It knows nothing of layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options

# Every row costs a multiplication per weight and another read of its inputs per program: for eight cuBLAS wins
MAX_ROWS = 4
_MAX_LONG_ROWS = 2  # of inputs longer than _SHORT_BYTES, whose weights leave fewer registers to the sums
_SHORT_BYTES = 8192

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Output features of a program, and bytes of a feature's weights that a warp reads. An input is read once for so many
# features; more warps on it mean more exchange for each result
_FEATURES, _WARP_BYTES = 4, 2048
# Fewer leave some of a Hopper GPU's 114 to 144 multiprocessors with half the work of others
_MIN_PROGRAMS = 256
_MAX_WARPS = 4  # more are slower for every row after the first
_MAX_THREAD_BYTES = 320  # of weights in the registers of a thread
_LOAD_BYTES = 16  # of a thread, the widest there is


def max_rows(weight: torch.Tensor) -> int:
    """Up to how many rows `few_rows_linear` beats cuBLAS with weight [N, K]; 0 if it does not, or cannot take it."""
    if weight.dtype not in _DTYPES or not weight.is_contiguous():
        return 0
    row_bytes = weight.shape[1] * weight.element_size()
    if row_bytes > 32 * _MAX_WARPS * _MAX_THREAD_BYTES:
        return 0
    return MAX_ROWS if row_bytes <= _SHORT_BYTES else _MAX_LONG_ROWS


def max_gated_rows(weight: torch.Tensor) -> int:
    """The same of `few_rows_gated`, whose programs have two rows of the weight in registers."""
    row_bytes = weight.shape[1] * weight.element_size()
    return max_rows(weight) if 2 * row_bytes <= 32 * _MAX_WARPS * _MAX_THREAD_BYTES else 0


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, *, add: bool = False
) -> torch.Tensor:
    """x [R, K], weight [N, K] contiguous, of one dtype -> x @ weight.T, [R, N] of that dtype; R at most MAX_ROWS.

    The dtype is bf16, fp16 or fp32. Rows of x and of `out` may be apart by any stride. `out` is new if None, and must
    not overlap x; with `add` the product is added to what it holds, and the sum rounded once. Compiled once for each
    dtype, K and cut, with and without `add`, and for 1, 2 and 3 to 4 rows.

    Raises:
        ValueError: too many rows, or shapes, dtypes or strides other than these.
    """
    rows, features = len(x), len(weight)
    if out is None:
        if add:
            raise ValueError("a product to add to nothing: out is None")
        out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    _check(x, weight, out, features)
    _launch(x, weight, out, add=add)
    return out


def few_rows_gated(x: torch.Tensor, weight: torch.Tensor, norm_eps: float | None = None) -> torch.Tensor:
    """x [R, K], weight [2 * N, K], the gates' features first -> silu(gates) * rest of x @ weight.T, [R, N], new.

    With `norm_eps` rows of the product are divided by the root mean square of their row of x, `norm_eps` added under
    the root. Rounded as `activation.silu_mul` of the product is; rows, dtypes and strides as in `few_rows_linear`.

    Raises:
        ValueError: an odd number of features, or see `few_rows_linear`.
    """
    features, odd = divmod(len(weight), 2)
    if odd:
        raise ValueError(f"gates and what they are multiplied with are {len(weight)} features: an odd number")
    out = torch.empty((x.shape[0], features), dtype=x.dtype, device=x.device)
    _check(x, weight, out, features)
    _launch(x, weight, out, gated=True, norm_eps=norm_eps)
    return out


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    add: bool = False,
    gated: bool = False,
    norm_eps: float | None = None,
) -> None:
    rows, (features, size) = len(x), weight.shape
    if rows == 0 or features == 0:
        return
    block_features, num_warps = _cut(features, size * x.element_size())
    if gated:
        block_features = max(block_features, 2)
    vector = _LOAD_BYTES // x.element_size()
    _few_rows_kernel[(triton.cdiv(features, block_features),)](
        x,
        weight,
        out,
        x.stride(0),
        out.stride(0),
        rows,
        out.shape[1],
        norm_eps or 0.0,
        ROWS=triton.next_power_of_2(rows),
        SIZE=size,
        FEATURES=block_features,
        BLOCK=32 * num_warps * vector,
        VECTOR=vector,
        ADD=add,
        GATED=gated,
        NORMED=norm_eps is not None,
        num_warps=num_warps,
        **launch_options(),
    )


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, features: int) -> None:
    rows, size = x.shape[0], weight.shape[1]
    problems = []
    if rows > MAX_ROWS or x.shape[1] != size or x.stride(1) != 1 or size == 0 or x.dtype not in _DTYPES:
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


def _cut(features: int, row_bytes: int) -> tuple[int, int]:
    """Output features and warps of a program, both powers of two; the warps depend on the length of a row alone."""
    num_warps = min(triton.next_power_of_2(triton.cdiv(row_bytes, _WARP_BYTES)), _MAX_WARPS)
    room = 32 * num_warps * _MAX_THREAD_BYTES
    block_features = _FEATURES
    while block_features > 1 and (block_features * row_bytes > room or block_features * _MIN_PROGRAMS > features):
        block_features //= 2
    return block_features, num_warps


@triton.jit
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    out_stride,
    rows,
    features,
    norm_eps,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`features` are those of the output; with GATED a program makes each of its own and, beside it, its gate."""
    if DEPENDENT:
        gdc_launch_dependents()
    OUTPUTS: tl.constexpr = FEATURES // 2 if GATED else FEATURES
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Past the end the last feature is read again: no mask on the loads
    if GATED:
        member = tl.arange(0, FEATURES)
        pair = tl.minimum(tl.program_id(0) * OUTPUTS + member // 2, features - 1)
        feature = pair + member % 2 * features
    else:
        feature = tl.minimum(output, features - 1)
    feature_ptr = weight_ptr + feature.to(tl.int64)[:, None] * SIZE
    weights: tl.tuple = ()
    for start in tl.static_range(0, SIZE, BLOCK):
        # Read once: the caches keep what others read again
        weights += (_load(feature_ptr, start, SIZE, BLOCK, "evict_first"),)
    if DEPENDENT:
        gdc_wait()

    sums: tl.tuple = ()
    squares: tl.tuple = ()
    added: tl.tuple = ()
    for row in tl.static_range(ROWS):
        sums += (tl.zeros([FEATURES, BLOCK // VECTOR], dtype=tl.float32),)
        squares += (tl.zeros([1, BLOCK // VECTOR], dtype=tl.float32),)
        if ADD:  # asked for before the sums are known, or its latency would follow theirs
            place, present = out_ptr + row * out_stride + output, (output < features) & (row < rows)
            added += (tl.load(place, mask=present, other=0.0).to(tl.float32),)
    for start in tl.static_range(0, SIZE, BLOCK):
        wide = weights[start // BLOCK].to(tl.float32)
        updated: tl.tuple = ()
        squared: tl.tuple = ()
        for row in tl.static_range(ROWS):
            # Past the end the last row is read again
            value = _load(x_ptr + tl.minimum(row, rows - 1) * x_stride, start, SIZE, BLOCK, "").to(tl.float32)
            products = tl.reshape(wide * value, [FEATURES, BLOCK // VECTOR, VECTOR])
            updated += (sums[row] + tl.sum(products, axis=2),)
            if NORMED:
                squared += (squares[row] + tl.sum(tl.reshape(value * value, [1, BLOCK // VECTOR, VECTOR]), axis=2),)
            else:
                squared += (squares[row],)
        sums = updated
        squares = squared

    for row in tl.static_range(ROWS):
        result = tl.sum(sums[row], axis=1)
        place, present = out_ptr + row * out_stride + output, (output < features) & (row < rows)
        if ADD:
            result += added[row]
        result = result.to(out_ptr.dtype.element_ty)
        if GATED:
            gate, up = tl.split(tl.reshape(result.to(tl.float32), [OUTPUTS, 2]))
            if NORMED:
                scale = tl.math.rsqrt(tl.sum(squares[row], axis=1) / SIZE + norm_eps)
                gate *= scale
                up *= scale
            activated = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty)
            result = (activated.to(tl.float32) * up).to(out_ptr.dtype.element_ty)
        tl.store(place, result, mask=present)


@triton.jit
def _load(row_ptr, start: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    """[1 or FEATURES, BLOCK] of rows, zero beyond SIZE; inputs are laid out over threads as the weights are."""
    column = start + tl.arange(0, BLOCK)[None, :]
    if start + BLOCK <= SIZE:
        return tl.load(row_ptr + column, eviction_policy=POLICY)
    else:
        return tl.load(row_ptr + column, mask=column < SIZE, other=0.0, eviction_policy=POLICY)
