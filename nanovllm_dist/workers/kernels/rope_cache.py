"""From the qkv product to attention's inputs in one launch: head norms, rotation, and the write to the paged cache.

A program takes a few neighbouring heads of one token, whichever of query, key and value they are, and masks decide
where each head goes: no branch, no limit on head counts, and few programs for a decode row. A head's result depends
on that head alone, and on its token's hidden row where that is given; above 256 tokens the squares of such a row are
summed in another order. Where slots come from, and who reads the cache, is not known here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm_dist.workers.kernels.dependent_launch import launch_options
from nanovllm_dist.workers.kernels.norm import row_scale

# Up to so many tokens there are several programs for each, to occupy the processors
FEW_TOKENS = 256
_FEW_HEADS, _MANY_HEADS = 8, 32  # of a program
# Of each half of a head, in a thread: as many as make a wide load of the fp32 tables. With another count, tables and
# heads are laid out differently over threads, and the tables go through shared memory behind barriers
ELEMENTS_PER_THREAD = 4


def norm_rope_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    qk_weight: torch.Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slot_mapping: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    hidden_eps: float = 0.0,
) -> torch.Tensor:
    """Norm and rotate queries and keys, store keys and values -> query [T, num_heads, head_dim], contiguous.

    Rounds where `QueryKeyNorm` and `rotate` round: after the division by the root mean square, after the weight, and
    after the rotation; all else is fp32. With `hidden`, qkv is a product with rows that were not normed: it is first
    divided by their root mean square, then the bias is added, and the sum rounded. Two tokens may name one slot
    (padding in block 0): either one's key stays.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], heads of queries, keys, values in that order; rows may be
            apart by any stride.
        positions: [T] int32 or int64, rows of the tables; not checked.
        cos_table: [max positions, head_dim] fp32, the second half equal to the first.
        sin_table: the same shape and dtype, the first half the negative of the second (see `RotaryEmbedding`).
        qk_weight: [num_heads + num_kv_heads, head_dim] in qkv's dtype, or None for a model without head norms.
        eps: of the head norms.
        num_heads: query heads.
        num_kv_heads: key heads, and as many value heads.
        head_dim: even.
        slot_mapping: [T] int32 or int64, block * block_size + offset, not negative; not checked.
        keys: [num_blocks, block_size, num_kv_heads, head_dim] in qkv's dtype; any strides, the last 1.
        values: the same.
        out: where the query goes, [T, num_heads, head_dim] contiguous; new if None.
        bias: [columns of qkv] in qkv's dtype, contiguous; taken with `hidden` alone.
        hidden: [T, any size] in qkv's dtype; rows may be apart by any stride. None: qkv is taken as it is.
        hidden_eps: what is added to a row's mean square.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or memory is not laid out as said above.
    """
    tokens = qkv.shape[0]
    if out is None:
        out = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _check(qkv, cos_table, sin_table, qk_weight, num_heads, num_kv_heads, head_dim, keys, values, out)
    _check_hidden(qkv, bias, hidden)
    if tokens == 0:
        return out
    all_heads, width = num_heads + 2 * num_kv_heads, 1 if hidden is None else hidden.shape[1]
    heads = min(_FEW_HEADS if tokens <= FEW_TOKENS else _MANY_HEADS, triton.next_power_of_2(all_heads))
    grid = (tokens, triton.cdiv(all_heads, heads))
    padded_half = triton.next_power_of_2(head_dim // 2)
    _norm_rope_store_kernel[grid](
        qkv,
        positions,
        cos_table,
        sin_table,
        qk_weight,
        slot_mapping,
        keys,
        values,
        out,
        bias,
        hidden,
        qkv.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        0 if hidden is None else hidden.stride(0),
        eps,
        hidden_eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        PADDED_HALF=padded_half,
        BLOCK_SIZE=keys.shape[1],
        WIDTH=width,
        PADDED_WIDTH=triton.next_power_of_2(width),
        HEADS=heads,
        num_warps=min(max(heads * padded_half // (32 * ELEMENTS_PER_THREAD), 1), 16),
        **launch_options(),
    )
    return out


def _check(
    qkv: torch.Tensor,
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    qk_weight: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    dtype = qkv.dtype
    problems = []
    if head_dim % 2 or qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or qkv.stride(1) != 1:
        problems.append(f"qkv {tuple(qkv.shape)} for {num_heads} + 2 * {num_kv_heads} heads of {head_dim}")
    for table in (cos_table, sin_table):
        if table.shape[1] != head_dim or table.dtype != torch.float32 or not table.is_contiguous():
            problems.append(f"table {tuple(table.shape)} {table.dtype}")
    if qk_weight is not None:
        shape = (num_heads + num_kv_heads, head_dim)
        if qk_weight.shape != shape or qk_weight.dtype != dtype or not qk_weight.is_contiguous():
            problems.append(f"head norm weight {tuple(qk_weight.shape)} {qk_weight.dtype}")
    for cache in (keys, values):
        if cache.shape[2:] != (num_kv_heads, head_dim) or cache.dtype != dtype or cache.stride(3) != 1:
            problems.append(f"cache {tuple(cache.shape)} {cache.dtype}")
    if keys.shape != values.shape or keys.shape[0] * keys.shape[1] >= 2**31:
        problems.append(f"caches {tuple(keys.shape)} and {tuple(values.shape)}")
    if out.shape != (qkv.shape[0], num_heads, head_dim) or out.dtype != dtype or not out.is_contiguous():
        problems.append(f"out {tuple(out.shape)} {out.dtype}")
    if problems:
        raise ValueError(f"norm_rope_store in {dtype} cannot take: {'; '.join(problems)}")


def _check_hidden(qkv: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor | None) -> None:
    problems = []
    if hidden is not None and (len(hidden) != len(qkv) or hidden.stride(1) != 1 or hidden.dtype != qkv.dtype):
        problems.append(f"hidden {tuple(hidden.shape)} {hidden.dtype}")
    if bias is not None and (
        hidden is None or bias.shape != qkv.shape[1:] or bias.dtype != qkv.dtype or not bias.is_contiguous()
    ):
        problems.append(f"bias {tuple(bias.shape)} {bias.dtype} with{'out' if hidden is None else ''} hidden")
    if problems:
        raise ValueError(f"norm_rope_store of {tuple(qkv.shape)} {qkv.dtype} cannot take: {'; '.join(problems)}")


@triton.jit
def _norm_rope_store_kernel(
    qkv_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    query_ptr,
    bias_ptr,
    hidden_ptr,
    qkv_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    hidden_stride,
    eps,
    hidden_eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, PADDED_HALF)[None, :]
    exists = column < HALF
    is_query = exists & (head < NUM_HEADS)
    is_key = exists & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_value = exists & (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)

    # A head's two halves are two tiles: they turn into each other without any exchange between threads
    place = head * (2 * HALF) + column
    row_ptr = qkv_ptr + token * qkv_stride
    present = is_query | is_key | is_value
    first = tl.load(row_ptr + place, mask=present, other=0.0)
    second = tl.load(row_ptr + place + HALF, mask=present, other=0.0)
    if hidden_ptr is not None:
        scale = row_scale(hidden_ptr + token * hidden_stride, hidden_eps, WIDTH, PADDED_WIDTH)
        first = _scaled(first, scale, bias_ptr, place, present)
        second = _scaled(second, scale, bias_ptr, place + HALF, present)

    slot = tl.load(slots_ptr + token).to(tl.int32)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    offset = slot % BLOCK_SIZE
    value_place = block * value_block_stride + offset * value_slot_stride
    value_place += (head - NUM_HEADS - NUM_KV_HEADS) * value_head_stride + column
    tl.store(values_ptr + value_place, first, mask=is_value)
    tl.store(values_ptr + value_place + HALF, second, mask=is_value)

    rotates = is_query | is_key
    if weight_ptr is not None:
        first, second = _normalise(first, second, weight_ptr + place, rotates, eps, HALF)
    position = tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF)
    cos = tl.load(cos_ptr + position + column, mask=exists, other=0.0)
    sin = tl.load(sin_ptr + position + HALF + column, mask=exists, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (wide_first * cos - wide_second * sin).to(first.dtype)
    turned_second = (wide_second * cos + wide_first * sin).to(first.dtype)

    query_place = token * (NUM_HEADS * 2 * HALF) + place
    tl.store(query_ptr + query_place, turned_first, mask=is_query)
    tl.store(query_ptr + query_place + HALF, turned_second, mask=is_query)
    key_place = block * key_block_stride + offset * key_slot_stride + (head - NUM_HEADS) * key_head_stride + column
    tl.store(keys_ptr + key_place, turned_first, mask=is_key)
    tl.store(keys_ptr + key_place + HALF, turned_second, mask=is_key)


@triton.jit
def _scaled(x, scale, bias_ptr, place, mask):
    """x * scale + bias, rounded once."""
    wide = x.to(tl.float32) * scale
    if bias_ptr is not None:
        wide += tl.load(bias_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return wide.to(x.dtype)


@triton.jit
def _normalise(first, second, weight_ptr, mask, eps, HALF: tl.constexpr):
    """RMSNorm over both halves of each row, padding being zero."""
    dtype = first.dtype
    first_weight = tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    squares = tl.sum(wide_first * wide_first + wide_second * wide_second, axis=1)
    scale = tl.math.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first = ((wide_first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype)
    second = ((wide_second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype)
    return first, second
