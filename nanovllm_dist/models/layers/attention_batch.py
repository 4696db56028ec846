"""What attention needs of one step, and the interface of an attention implementation.

How keys are found in the cache is the backend's business; which request a row belongs to is nobody's here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass
class AttentionBatch:
    """R rows of T tokens in all, and the paged cache that holds their keys and values.

    Tokens beyond the rows' own are padding: they are run, and what comes out for them means nothing.

    Attributes:
        slot_mapping: [T] int64, where each token's key and value go: block * block_size + offset, or in a cache of
            rows that of the first head, block * block_size * num_kv_heads + offset. Tokens that must not be written,
            and padding, point into block 0, which is never a row's.
        block_tables: [R, max_blocks] int32, each row's blocks in order; entries beyond its context are not read.
        context_lens: [R] int32, keys visible to the row's last token, those of this step included.
        query_start: [R + 1] int32, where each row's tokens begin.
        num_decodes: the first so many rows have exactly one token each; the others are prefill chunks.
        host_query_lens: tokens of each row, on the host; empty in a step recorded as a graph, unless the device's
            graphs take lengths anew each time.
        host_context_lens: `context_lens` on the host; likewise.
        kv_caches: keys and values of each layer, [num_blocks, block_size, num_kv_heads of this rank, head_dim] or the
            same numbers as rows of head_dim, in the order [num_blocks, num_kv_heads, block_size]. Must
            start as zeros: a backend may read slots behind a row's last key and mask them, which does not hide a NaN.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    num_decodes: int
    host_query_lens: list[int]
    host_context_lens: list[int]
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]]


class AttentionBackend(Protocol):
    """Causal attention over a paged cache, with a score scale of 1 / sqrt(head_dim)."""

    def prepare(self, batch: AttentionBatch) -> Any:
        """Whatever all layers of this step share; called once per step."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        plan: Any,
    ) -> torch.Tensor:
        """Write keys and values to the cache of `layer`, then attend.

        query [T, heads, head_dim], key and value [T, kv heads, head_dim], `plan` from `prepare` ->
        [T, heads, head_dim]. Consecutive query heads share a key/value head, in equal groups.
        """
        ...
