"""The paged KV cache of one rank: how many blocks fit, and their tensors. It does not know who holds a block."""

from __future__ import annotations

import math

import numpy as np
import torch

from nanovllm_dist.errors import ConfigError

KVCache = list[tuple[torch.Tensor, torch.Tensor]]


def bytes_per_block(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def blocks_that_fit(cache_bytes: int, block_bytes: int, most_useful: int) -> int:
    """Blocks for `cache_bytes`, no more than `most_useful`. Raises ConfigError below two (one is the null block)."""
    blocks = min(cache_bytes // block_bytes, most_useful)
    if blocks < 2:
        if cache_bytes < block_bytes:
            raise ConfigError(
                f"weights and the largest step leave {max(0, cache_bytes)} bytes for the KV cache, and a block takes "
                f"{block_bytes}: raise memory_utilization or kv_cache_memory, lower max_num_batched_tokens or "
                "block_size, or use more ranks"
            )
        raise ConfigError(
            f"{cache_bytes} bytes for the KV cache hold {cache_bytes // block_bytes} blocks of {block_bytes} bytes, "
            "and at least 2 are needed: raise kv_cache_memory or memory_utilization, or lower block_size"
        )
    return blocks


def allocate(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    heads_first: bool = False,
) -> KVCache:
    """Keys and values per layer, each [num_blocks, block_size, num_kv_heads, head_dim].

    `heads_first`: in memory, the slots of one head lie together in a block.
    Zeros, because a masked key of garbage may be NaN, and NaN times probability zero is NaN.
    """
    if heads_first:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        made = [[_zeros(shape, dtype, device).transpose(1, 2) for _ in range(2)] for _ in range(num_layers)]
    else:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        made = [[_zeros(shape, dtype, device) for _ in range(2)] for _ in range(num_layers)]
    return [(keys, values) for keys, values in made]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are pages that the system hands out when they are first used, and huge ones where it can:
    # a cache costs memory only as it fills, and a step that reads it all over misses the TLB less
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
