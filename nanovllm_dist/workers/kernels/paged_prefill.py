"""Causal attention of prefill chunks over a paged cache that already holds their keys: bound by arithmetic.

A program takes a tile of QUERIES lines, which are the query heads of one group for a run of neighbouring tokens of
one row, and passes over the row's keys from the first on: tiles of keys that all lines see without a mask, then those
on the diagonal. Keys are taken in the same tiles whatever the chunk, so a token's result depends on its context
alone, not on the batch and not on where its prompt was cut.

Rows have their tiles one after the other, with room for one tile more than may be needed, so that the grid follows
from the number of tokens and rows, which the host knows, and a program finds its row by bisection. It knows nothing
of requests or layers, and does not write the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanovllm_dist.workers.kernels.attention_config import PrefillConfig
from nanovllm_dist.workers.kernels.paged_tiles import LOG2E, block_of, check_layout, load_tile, slots_of, softmax_step


def default_config(dtype: torch.dtype) -> PrefillConfig:
    """The configuration for queries of this dtype on a Hopper GPU."""
    if dtype == torch.float32:
        return PrefillConfig(queries=32, tile=32, num_warps=8, num_stages=1)
    return PrefillConfig(queries=128, tile=64, num_warps=8, num_stages=3)


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Row r's tokens query_start[r]..query_start[r + 1] over its context, the last token at the last key.

    query [T, heads, head_dim], tokens at any distance; keys and values [num_blocks, block_size, kv_heads, head_dim]
    with equal strides, the last of them 1; block_tables [R, max_blocks] int32; context_lens [R] int32, at least the
    row's tokens; query_start [R + 1] int32, rising, which need not begin at 0 nor end at T; scale > 0. `out` [T, heads,
    head_dim] contiguous, new if None -> `out`, where tokens outside query_start are left as they were. Slots behind
    a context are not read. Raises ValueError for layouts it cannot read.
    """
    tokens, heads, head_dim = query.shape
    block_size, kv_heads = keys.shape[1:3]
    check_layout(query, keys, values, block_tables)
    rows, group = len(context_lens), heads // kv_heads
    config = default_config(query.dtype) if config is None else config
    if len(query_start) != rows + 1 or len(block_tables) != rows or group > config.queries:
        raise ValueError(f"{len(query_start)} starts, {len(block_tables)} tables, {rows} rows, groups of {group}")
    out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device) if out is None else out
    if rows == 0:
        return out
    _prefill[(tokens // (config.queries // group) + rows, kv_heads)](
        out,
        query,
        keys,
        values,
        block_tables,
        context_lens,
        query_start,
        rows,
        scale * LOG2E,
        query.stride(0),
        block_tables.stride(0),
        *keys.stride()[:3],
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TOKENS=config.queries // group,
        QUERIES=config.queries,
        TILE=config.tile,
        WIDTH=triton.next_power_of_2(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit(
    do_not_specialize=["num_rows", "table_stride"],
    # the rows behind the decodes begin anywhere in these
    do_not_specialize_on_alignment=["block_tables", "context_lens", "query_start"],
)
def _prefill(
    out,
    query,
    keys,
    values,
    block_tables,
    context_lens,
    query_start,
    num_rows,
    scale,
    query_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of TOKENS tokens of a row, for the query heads of one key/value head."""
    # the last tiles of a row have the most keys: they start first, so that they do not end alone
    place = tl.num_programs(0) - 1 - tl.program_id(0) + tl.load(query_start) // TOKENS
    row = _row_of(query_start, place, num_rows, TOKENS)
    begin = tl.load(query_start + row)
    length = tl.load(query_start + row + 1) - begin
    first = (place - begin // TOKENS - row) * TOKENS
    if first >= length:
        return
    head = tl.program_id(1)
    context = tl.load(context_lens + row)
    first_position = context - length + first
    line = tl.arange(0, QUERIES)
    column = tl.arange(0, WIDTH)
    position = first_position + line // GROUP
    token = begin + first + line // GROUP
    query_head = head * GROUP + line % GROUP
    present = (line < TOKENS * GROUP) & (first + line // GROUP < length)
    present = present[:, None] & (column[None, :] < HEAD_DIM)
    cells = token[:, None] * query_stride + query_head[:, None] * HEAD_DIM + column[None, :]
    queries = tl.load(query + cells, mask=present, other=0.0)

    table = block_tables + row * table_stride
    keys += head * head_stride
    values += head * head_stride
    end = tl.minimum(first_position + TOKENS, context)
    diagonal = (first_position + 1) // TILE * TILE
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    block = block_of(table, 0, end, BLOCK_SIZE, TILE)
    for start in range(0, diagonal, TILE):
        slot = slots_of(block, start, block_stride, slot_stride, BLOCK_SIZE, TILE)
        block = block_of(table, start + TILE, end, BLOCK_SIZE, TILE)
        maximum, total, acc = _attend(
            queries, keys, values, slot, start, end, position, column, scale, maximum, total, acc,
            HEAD_DIM, TILE, WIDTH, WHOLE=True,
        )  # fmt: skip
    for start in range(diagonal, end, TILE):
        slot = slots_of(block, start, block_stride, slot_stride, BLOCK_SIZE, TILE)
        block = block_of(table, start + TILE, end, BLOCK_SIZE, TILE)
        maximum, total, acc = _attend(
            queries, keys, values, slot, start, end, position, column, scale, maximum, total, acc,
            HEAD_DIM, TILE, WIDTH, WHOLE=False,
        )  # fmt: skip
    cells = (token[:, None] * (tl.num_programs(1) * GROUP) + query_head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(out + cells, acc / total[:, None], mask=present)


@triton.jit
def _row_of(query_start, place, num_rows, TOKENS: tl.constexpr):
    """The last row whose tiles begin at or before `place`; row r's begin at query_start[r] // TOKENS + r."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_start + middle) // TOKENS + middle <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _attend(
    queries,
    keys,
    values,
    slot,
    start,
    end,
    position,
    column,
    scale,
    maximum,
    total,
    acc,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Take keys start..start + TILE into the softmax; WHOLE promises that every line sees all of them."""
    key = start + tl.arange(0, TILE)
    visible = key < end
    cells = slot[:, None] + column[None, :]
    key_tile = load_tile(keys, cells, visible, column, HEAD_DIM, WIDTH, WHOLE)
    scores = tl.dot(queries, tl.trans(key_tile), input_precision="ieee")
    if not WHOLE:
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    value_tile = load_tile(values, cells, visible, column, HEAD_DIM, WIDTH, WHOLE)
    return softmax_step(scores, value_tile, scale, maximum, total, acc)
