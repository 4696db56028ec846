"""Batch: what a worker keeps of every running request between steps, and the inputs it makes of a step.

One row per slot, updated by deltas. Positions, block tables and counts are host integers; token ids are on the
device, because a sampled token may feed the next step before any host has seen it. It does not know policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nanovllm_dist.models.layers.attention import AttentionBatch
from nanovllm_dist.wire.messages import NewRow, Step, unpack_ints
from nanovllm_dist.workers.kv_cache import KVCache

Ints = npt.NDArray[np.int64]


@dataclass
class StepInputs:
    """One step, ready to run. `T` tokens of `R` rows, of which `S` sample.

    `input_ids`, `positions`: [T] int64. `sample_slots`, `sample_positions`: [S], the slot of each sampling row
    and the position its new token takes. `sample_index`: [S], where its logits come from among the T tokens.
    `prompt_rows`: (slot, first position, last position) of prompt tokens whose successors' log-probabilities
    are wanted, and the index of the first among the T tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    sample_slots: Ints
    sample_positions: Ints
    sample_index: torch.Tensor
    prompt_rows: list[tuple[int, int, int, int]]


class Batch:
    """Rows of one worker: at most `max_num_seqs`, each of at most `max_len` tokens."""

    def __init__(self, max_num_seqs: int, max_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.token_ids = torch.zeros(max_num_seqs, max_len + 1, dtype=torch.int32, device=device)
        self.num_tokens: Ints = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed: Ints = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_cached: Ints = np.zeros(max_num_seqs, dtype=np.int64)
        self._prompt_len: Ints = np.zeros(max_num_seqs, dtype=np.int64)
        self._wants_prompt = np.zeros(max_num_seqs, dtype=bool)
        self._tables = np.zeros((max_num_seqs, -(-max_len // block_size) + 1), dtype=np.int32)
        self._table_len: Ints = np.zeros(max_num_seqs, dtype=np.int64)

    def apply(self, step: Step) -> None:
        """Take in the step's new rows and grown block tables."""
        for row in step.new_rows:
            self._enter(row)
        for slot, block in zip(unpack_ints(step.grow_slots), unpack_ints(step.grow_blocks), strict=True):
            self._tables[slot, self._table_len[slot]] = block
            self._table_len[slot] += 1

    def _enter(self, row: NewRow) -> None:
        slot = row.slot
        tokens = np.frombuffer(row.tokens, dtype="<i4")
        self.token_ids[slot, : len(tokens)] = torch.from_numpy(tokens.astype(np.int32)).to(self.device)
        blocks = np.frombuffer(row.blocks, dtype="<i4")
        self._tables[slot, : len(blocks)] = blocks
        self._table_len[slot] = len(blocks)
        self.num_tokens[slot] = len(tokens)
        self._num_computed[slot] = row.num_computed
        self._num_cached[slot] = row.num_cached
        self._prompt_len[slot] = row.prompt_len
        self._wants_prompt[slot] = row.params.prompt_logprobs is not None

    def prepare(self, step: Step, kv_caches: KVCache) -> StepInputs:
        """Inputs of the step's forward; advances the counters past it."""
        slots = np.frombuffer(step.slots, dtype="<i4").astype(np.int64)
        counts = np.frombuffer(step.counts, dtype="<i4").astype(np.int64)
        starts = self._num_computed[slots]
        ends = starts + counts
        query_start = np.zeros(len(slots) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        row_of_token = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(query_start[-1]) - query_start[row_of_token] + starts[row_of_token]
        slot_of_token = slots[row_of_token]
        samples = ends == self.num_tokens[slots]

        attention = AttentionBatch(
            slot_mapping=self._to_device(self._cache_slots(slot_of_token, positions)),
            block_tables=self._to_device(self._tables[slots, : -(-int(ends.max()) // self.block_size)]),
            context_lens=self._to_device(ends.astype(np.int32)),
            query_start=self._to_device(query_start.astype(np.int32)),
            num_decodes=int((counts == 1).sum()),
            host_query_lens=counts.tolist(),
            host_context_lens=ends.tolist(),
            kv_caches=kv_caches,
        )
        device_positions = self._to_device(positions)
        inputs = StepInputs(
            input_ids=self.token_ids[self._to_device(slot_of_token), device_positions].long(),
            positions=device_positions,
            attention=attention,
            sample_slots=slots[samples],
            sample_positions=ends[samples],
            sample_index=self._to_device(query_start[1:][samples] - 1),
            prompt_rows=self._prompt_rows(slots, starts, ends, query_start),
        )
        self._num_computed[slots] = ends
        self.num_tokens[inputs.sample_slots] += 1
        return inputs

    def append(self, inputs: StepInputs, tokens: torch.Tensor) -> None:
        """Put the sampled tokens [S] where the next step reads them."""
        slots, positions = self._to_device(inputs.sample_slots), self._to_device(inputs.sample_positions)
        self.token_ids[slots, positions] = tokens.to(torch.int32)

    def _cache_slots(self, slots: Ints, positions: Ints) -> Ints:
        blocks = self._tables[slots, positions // self.block_size].astype(np.int64)
        places = blocks * self.block_size + positions % self.block_size
        # a token whose keys are cached already runs only for its logits: it writes to the null block
        places[positions < self._num_cached[slots]] = 0
        return places

    def _prompt_rows(self, slots: Ints, starts: Ints, ends: Ints, query_start: Ints) -> list[tuple[int, int, int, int]]:
        if not self._wants_prompt[slots].any():
            return []
        rows = []
        for index in np.flatnonzero(self._wants_prompt[slots]):
            slot, start = int(slots[index]), int(starts[index])
            last = min(int(ends[index]), int(self._prompt_len[slot]) - 1)
            if start < last:
                rows.append((slot, start, last, int(query_start[index])))
        return rows

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
