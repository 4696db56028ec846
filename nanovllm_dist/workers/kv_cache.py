"""The paged KV cache of one rank: how many blocks fit, and their tensors. It does not know who holds a block."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from nanovllm_dist.errors import ConfigError

KVCache = list[tuple[torch.Tensor, torch.Tensor]]
# Keys of a layer are [blocks, block_size, kv heads, head_dim]. In memory a block holds whole tokens one after the other
# ("tokens"), or all tokens of a head before those of the next ("heads"); "rows" is that as plain rows of head_dim
CacheLayout = Literal["tokens", "heads", "rows"]


def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def blocks_that_fit(cache_bytes: int, block_bytes: int, least: int, most_useful: int) -> int:
    """Blocks for `cache_bytes`, no more than `most_useful`. Raises ConfigError below `least`."""
    blocks = min(cache_bytes // block_bytes, most_useful)
    if blocks < least:
        if cache_bytes < block_bytes:
            raise ConfigError(
                f"weights and the largest step leave {max(0, cache_bytes)} bytes for the KV cache, and a block takes "
                f"{block_bytes}: raise memory_utilization or kv_cache_memory, lower max_num_batched_tokens or "
                "block_size, or use more ranks"
            )
        raise ConfigError(
            f"{cache_bytes} bytes for the KV cache hold {cache_bytes // block_bytes} blocks of {block_bytes} bytes, "
            f"and at least {least} are needed: raise kv_cache_memory or memory_utilization, or lower block_size"
        )
    return blocks


def block_stride(layout: CacheLayout, block_size: int, num_kv_heads: int) -> int:
    """Slots from one block to the next, as `AttentionBatch.slot_mapping` counts them."""
    return block_size * num_kv_heads if layout == "rows" else block_size


def allocate(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: CacheLayout = "tokens",
) -> KVCache:
    """Keys and values per layer, each [num_blocks, block_size, num_kv_heads, head_dim] or, in rows,
    [num_blocks * num_kv_heads * block_size, head_dim].

    Zeros, because a masked key of garbage may be NaN, and NaN times probability zero is NaN.
    Raises ConfigError when there is no memory for them.
    """
    by_head = (num_blocks, num_kv_heads, block_size, head_dim)
    by_token = (num_blocks, block_size, num_kv_heads, head_dim)

    def one() -> torch.Tensor:
        if layout == "tokens":
            return _zeros(by_token, dtype, device)
        zeros = _zeros(by_head, dtype, device)
        return zeros.transpose(1, 2) if layout == "heads" else zeros.view(-1, head_dim)

    try:
        return [(one(), one()) for _ in range(num_layers)]
    except (MemoryError, torch.OutOfMemoryError) as error:
        size = num_blocks * bytes_per_block(num_layers, block_size, num_kv_heads, head_dim, dtype)
        raise ConfigError(
            f"num_blocks: a KV cache of {num_blocks} blocks takes {size} bytes, and there are not so many: lower "
            "num_blocks, or where that was not given kv_cache_memory or memory_utilization"
        ) from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are pages that the system hands out when they are first used, and huge ones where it can:
    # a cache costs memory only as it fills, and a step that reads it all over misses the TLB less
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
