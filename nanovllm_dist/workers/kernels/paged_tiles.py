"""What decode and prefill attention share: finding and loading a tile of a row's keys, and the online softmax over it.

The cache is [num_blocks, block_size, kv_heads, head_dim] at any strides, and a row's block table says in which block
each run of block_size keys lies. Which rows, heads and tiles there are is the callers' business.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


def check_layout(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block_tables: torch.Tensor) -> None:
    """Raise ValueError unless the kernels of this room can read these tensors."""
    dtypes = {query.dtype, keys.dtype, values.dtype}
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys {keys.shape} {keys.stride()} and values {values.shape} {values.stride()}")
    if query.stride()[1:] != (query.shape[2], 1) or query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[2]:
        raise ValueError(f"queries {query.shape} {query.stride()} for keys {keys.shape}")
    if len(dtypes) > 1 or block_tables.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise ValueError(f"queries, keys, values of {dtypes}, block tables of {block_tables.dtype}")


@triton.jit
def block_of(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block that holds keys start..start + TILE of a row, or [TILE] blocks where a tile may span several.

    `start` is a multiple of TILE; nothing is read for keys from `end` on. Loops carry it one tile ahead: found
    beside its tile it would be one more link of the chain that the pipeline has to hide, and cost it a stage.
    """
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        key = start + tl.arange(0, TILE)
        block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)
    return block


@triton.jit
def slots_of(block, start, block_stride, slot_stride, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """int64 [TILE] element offsets of keys start..start + TILE, in what `block_of` gave for them."""
    base = block.to(tl.int64) * block_stride
    if BLOCK_SIZE % TILE == 0:
        slots = base + (start % BLOCK_SIZE + tl.arange(0, TILE)) * slot_stride
    else:
        slots = base + (start + tl.arange(0, TILE)) % BLOCK_SIZE * slot_stride
    return slots


@triton.jit
def load_tile(cache, cells, visible, column, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """[TILE, WIDTH] of keys or values, zeros where not `visible` [TILE]; WHOLE promises that all are.

    A masked slot must not even be read: it may hold NaN, and NaN times a weight of zero is NaN.
    """
    if WHOLE and HEAD_DIM == WIDTH:
        tile = tl.load(cache + cells)
    elif WHOLE:
        tile = tl.load(cache + cells, mask=column[None, :] < HEAD_DIM, other=0.0)
    elif HEAD_DIM == WIDTH:
        tile = tl.load(cache + cells, mask=visible[:, None], other=0.0)
    else:
        tile = tl.load(cache + cells, mask=visible[:, None] & (column[None, :] < HEAD_DIM), other=0.0)
    return tile


@triton.jit
def softmax_step(scores, value_tile, scale, maximum, total, acc):
    """Take one tile into an online softmax: scores [M, N] before `scale` (in base 2), value_tile [N, D]."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * decay[:, None], input_precision="ieee")
    return new_maximum, total, acc
