"""Paged attention from torch's own operators, for any device; written for, and measured on, the CPU.

Decode rows are sorted by length and attended to in buckets: the blocks of a bucket are copied into a workspace
that stays in the cache of a core, and one fused call runs over it, with the query heads of a group as its query
rows. A prefill row attends alone. It knows nothing of weights or layers beyond a layer's index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovllm_dist.models.layers.attention_batch import AttentionBatch

# Keys (and as much again for values) gathered at a time: what a core's second-level cache holds. On a Zen 4 core,
# 64 rows of 50..500 tokens, 3 x 3 heads of 64: 4.6 ms a layer in bf16 against 12.7 ms in one piece, 5.2 row by row.
_BUCKET_BYTES = 2**20


@dataclass(frozen=True)
class _DecodeBucket:
    """Decode rows [start, end) in length order, cut to the longest of them. mask [rows, 1, 1, length] or None."""

    start: int
    end: int
    length: int
    blocks: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _PrefillRow:
    """Tokens [start, end) of the step; `blocks` and `mask` [end - start, length] only if it has a prefix."""

    start: int
    end: int
    length: int
    blocks: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """`order` sorts the decode rows by length and `inverse` undoes it; None when they are in one bucket."""

    order: torch.Tensor | None
    inverse: torch.Tensor | None
    buckets: list[_DecodeBucket]
    prefills: list[_PrefillRow]
    num_tokens: int


class TorchAttention:
    """An AttentionBackend that needs nothing but torch. Not for concurrent use: its workspace is its own."""

    def __init__(self) -> None:
        self._workspace = torch.empty(0)

    def prepare(self, batch: AttentionBatch) -> _Plan:
        """Buckets, gather indices and masks of this step."""
        order = self._length_order(batch) if self.plans_decodes() else []
        buckets = self._decode_buckets(batch, order)
        sort = unsort = None
        if len(buckets) > 1:
            sort = torch.tensor(order, device=batch.block_tables.device)
            unsort = torch.argsort(sort)
        prefills = _prefill_rows(batch) if self.plans_prefills() else []
        return _Plan(sort, unsort, buckets, prefills, sum(batch.host_query_lens))

    def plans_decodes(self) -> bool:
        """Whether `attend` fills in the decode rows; a subclass may do so itself."""
        return True

    def plans_prefills(self) -> bool:
        """The same of the prefill rows."""
        return True

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        plan: _Plan,
    ) -> torch.Tensor:
        """See AttentionBackend."""
        for cache, new in zip(batch.kv_caches[layer], (key, value), strict=True):
            cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, new)
        return self.attend_stored(query, key, value, layer, batch, plan)

    def attend_stored(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        plan: _Plan,
    ) -> torch.Tensor:
        """`attend` for keys and values that are in the cache already."""
        caches = batch.kv_caches[layer]
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        output[plan.num_tokens :].zero_()
        if plan.buckets:
            output[: batch.num_decodes] = self._decode(query[: batch.num_decodes], caches, plan)
        for row in plan.prefills:
            span = slice(row.start, row.end)
            output[span] = _prefill(query[span], key[span], value[span], caches, row)
        return output

    def _length_order(self, batch: AttentionBatch) -> list[int]:
        return sorted(range(batch.num_decodes), key=batch.host_context_lens.__getitem__)

    def _decode_buckets(self, batch: AttentionBatch, order: list[int]) -> list[_DecodeBucket]:
        if not order:
            return []
        cache = batch.kv_caches[0][0]
        block_size = cache.shape[1]
        max_blocks = max(1, _BUCKET_BYTES // (cache[0].numel() * cache.element_size()))
        ends = _bucket_ends([_ceil_div(batch.host_context_lens[row], block_size) for row in order], max_blocks)
        if len(ends) == 1:
            order = list(range(len(order)))
        buckets = []
        for start, end in zip([0, *ends], ends, strict=False):
            buckets.append(_decode_bucket(batch, order[start:end], start, block_size, cache.dtype))
        return buckets

    def _decode(self, query: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], plan: _Plan) -> torch.Tensor:
        """query [rows, heads, head_dim] -> the same shape."""
        kv_heads = caches[0].shape[2]
        grouped = query.view(query.shape[0], kv_heads, -1, query.shape[-1])
        if plan.order is not None:
            grouped = grouped.index_select(0, plan.order)
        parts = []
        for bucket in plan.buckets:
            keys, values = self._gather(caches, bucket)
            rows = grouped[bucket.start : bucket.end]
            parts.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=bucket.mask))
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        if plan.inverse is not None:
            output = output.index_select(0, plan.inverse)
        return output.flatten(1, 2)

    def _gather(
        self, caches: tuple[torch.Tensor, torch.Tensor], bucket: _DecodeBucket
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the bucket's rows, [rows, kv heads, length, head_dim] each, in the workspace."""
        shape = (2, len(bucket.blocks), *caches[0].shape[1:])
        space = self._space(shape, caches[0])
        rows = bucket.end - bucket.start
        keys, values = (
            torch.index_select(cache, 0, bucket.blocks, out=part)
            .view(rows, -1, *cache.shape[2:])[:, : bucket.length]
            .transpose(1, 2)
            for cache, part in zip(caches, space.unbind(0), strict=True)
        )
        return keys, values

    def _space(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        size = torch.Size(shape).numel()
        kept = self._workspace
        if kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._workspace = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)


def _bucket_ends(block_counts: list[int], max_blocks: int) -> list[int]:
    """Cut rows in rising order of blocks into runs whose padded size is at most `max_blocks`; the runs' ends."""
    ends = []
    start = 0
    for index, count in enumerate(block_counts):
        if index > start and (index - start + 1) * count > max_blocks:
            ends.append(index)
            start = index
    return [*ends, len(block_counts)]


def _decode_bucket(
    batch: AttentionBatch, rows: list[int], start: int, block_size: int, dtype: torch.dtype
) -> _DecodeBucket:
    device = batch.block_tables.device
    lengths = [batch.host_context_lens[row] for row in rows]
    longest = max(lengths)
    tables = batch.block_tables[:, : _ceil_div(longest, block_size)]
    blocks = tables.index_select(0, torch.tensor(rows, device=device)).flatten()
    mask = None
    if min(lengths) < longest:
        hidden = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device).unsqueeze(1)
        mask = _additive(hidden, dtype).view(len(rows), 1, 1, longest)
    return _DecodeBucket(start, start + len(rows), longest, blocks, mask)


def _prefill_rows(batch: AttentionBatch) -> list[_PrefillRow]:
    block_size = batch.kv_caches[0][0].shape[1]
    rows = []
    start = batch.num_decodes
    for row in range(batch.num_decodes, len(batch.host_query_lens)):
        count, length = batch.host_query_lens[row], batch.host_context_lens[row]
        blocks = mask = None
        if length > count:
            blocks = batch.block_tables[row, : _ceil_div(length, block_size)]
            # the last token sees all keys, each one before it one less
            last_visible = torch.arange(length - count, length, device=blocks.device).unsqueeze(1)
            hidden = torch.arange(length, device=blocks.device) > last_visible
            mask = _additive(hidden, batch.kv_caches[0][0].dtype)
        rows.append(_PrefillRow(start, start + count, length, blocks, mask))
        start += count
    return rows


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    row: _PrefillRow,
) -> torch.Tensor:
    """query [tokens, heads, head_dim] of one row -> the same shape."""
    if row.blocks is not None:
        key, value = (cache.index_select(0, row.blocks).flatten(0, 1)[: row.length] for cache in caches)
    kv_heads = key.shape[1]
    # key/value heads are the batch and each is repeated, without a copy, over the query heads of its group
    grouped = query.view(query.shape[0], kv_heads, -1, query.shape[-1]).permute(1, 2, 0, 3)
    keys, values = (part.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for part in (key, value))
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=row.mask, is_causal=row.mask is None)
    return output.permute(2, 0, 1, 3).flatten(1, 2)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
