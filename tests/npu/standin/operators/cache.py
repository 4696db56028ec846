"""Operators that write rows into a cache or a table in place."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_nd_update_(target: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """`target[indices[i]] = updates[i]`: the last dimension of indices names the leading dimensions of target.

    Where an index comes twice, the later row stays; a card promises no order.
    """
    depth = indices.shape[-1]
    shape = torch.tensor(target.shape[:depth])
    places = indices.reshape(-1, depth).long()
    _refuse_outside(
        bool(((places < 0) | (places >= shape)).any()), f"indices of npu_scatter_nd_update_ for {shape.tolist()}"
    )
    weights = torch.tensor([int(shape[i + 1 :].prod()) for i in range(depth)])
    rows = target.view(int(shape.prod()), -1)
    flat = (places * weights).sum(-1)
    new = updates.reshape(flat.numel(), -1).to(target.dtype)
    last = {place: index for index, place in enumerate(flat.tolist())}
    rows[list(last)] = new[list(last.values())]
    return target


def scatter_nd_update(target: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The same on a copy."""
    return scatter_nd_update_(target.clone(memory_format=torch.contiguous_format), indices, updates)


def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Writes key and value [T, heads, D] to slots of caches [blocks, block size, heads, D], for cache_mode "Norm"."""
    if cache_mode != "Norm":
        raise NotImplementedError(
            f"npu_scatter_pa_kv_cache with cache_mode={cache_mode!r} is not emulated: an ND cache is 'Norm'"
        )
    if compress_lens is not None or compress_seq_offsets is not None or seq_lens is not None:
        raise NotImplementedError("npu_scatter_pa_kv_cache with compression is not emulated")
    slots = slot_mapping.long()
    limit = key_cache.shape[0] * key_cache.shape[1]
    _refuse_outside(bool(((slots < 0) | (slots >= limit)).any()), f"slots of npu_scatter_pa_kv_cache for {limit}")
    for cache, rows in ((key_cache, key), (value_cache, value)):
        cache.view(limit, *cache.shape[2:])[slots] = rows.to(cache.dtype)


def _refuse_outside(outside: bool, what: str) -> None:
    if outside:
        raise IndexError(f"{what} places lie outside: a card would write there")


KERNELS = {
    "npu_scatter_nd_update_": scatter_nd_update_,
    "npu_scatter_nd_update": scatter_nd_update,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
}
