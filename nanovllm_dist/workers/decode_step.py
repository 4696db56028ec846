"""One step of decodes as a function of its inputs, from the token table back to it: what devices turn into a graph.

All that lasts from step to step is an attribute, at an address that does not change. It knows no requests and no
graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLM
from nanovllm_dist.workers.kv_cache import KVCache

if TYPE_CHECKING:
    from nanovllm_dist.workers.platform.base import DeviceSampler


class DecodeStep(nn.Module):
    """Rows of one token each, sampled by the device.

    Args:
        token_ids: [rows, length], the token table.
        block_tables: [rows, blocks] int32.
        logits: where to put this rank's logits, [rows or more, columns], or None for a tensor of their own.

    Attributes:
        known, sampled: the token table, as it is read and as it is written. They are one tensor; a compiler that copies
            what is both read and written may be shown two.
        starts: where the tokens of each row begin, and end: one each.
    """

    def __init__(
        self,
        model: DecoderLM,
        sampler: DeviceSampler,
        token_ids: torch.Tensor,
        block_tables: torch.Tensor,
        kv_caches: KVCache,
        logits: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.sampler = sampler
        self.known = token_ids.view(-1)
        self.sampled = self.known
        self.block_tables = block_tables
        self.kv_caches = kv_caches
        self.logits = logits
        self.starts = torch.arange(len(block_tables) + 1, dtype=torch.int32, device=token_ids.device)

    def forward(self, inputs: list[torch.Tensor], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [size], this rank's logits [size, columns]).

        Args:
            inputs: `Batch.decode_arrays`, float32 inverse temperatures and uniforms, on the device.
            lengths: the context lengths on the host; empty where the device needs none there.
        """
        places, slots, positions, cache_slots, context_lens, inv_temperature, uniforms = inputs
        size = len(slots)
        batch = AttentionBatch(
            slot_mapping=cache_slots,
            block_tables=self.block_tables.index_select(0, slots),
            context_lens=context_lens,
            query_start=self.starts[: size + 1],
            num_decodes=size,
            host_query_lens=[1] * len(lengths),
            host_context_lens=lengths,
            kv_caches=self.kv_caches,
        )
        hidden = self.model.forward(self.known.index_select(0, places), positions, batch)
        logits = self.model.lm_head.forward(hidden, out=None if self.logits is None else self.logits[:size])
        tokens = self.sampler.sample(logits, inv_temperature, uniforms)
        return self.sampler.append(self.sampled, places, tokens), logits
