"""Batch: what a worker keeps of every running request between steps, and the inputs it makes of a step.

One row per slot, updated by deltas, and one row more for padding. Positions and counts are host integers; token ids
are on the device, because a sampled token may feed the next step before any host has seen it. It knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.wire.messages import NewRow, Step
from nanovllm_dist.workers.kv_cache import KVCache
from nanovllm_dist.workers.transfers import Array, Transfers

Ints = npt.NDArray[np.int64]
# Columns of block tables come in such multiples: devices copy rows of whole 16 bytes faster
_TABLE_UNIT = 4


@dataclass(frozen=True)
class StepRows:
    """The R rows of one step, as host integers [R]: `slots`, tokens run (`counts`), and positions [starts, ends).

    `samples` [R] says which rows get a token, at position `ends`.
    """

    slots: Ints
    counts: Ints
    starts: Ints
    ends: Ints
    samples: npt.NDArray[np.bool_]

    @classmethod
    def none(cls) -> StepRows:
        """No rows: all of a padded step is padding."""
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, nothing, nothing, np.empty(0, dtype=bool))

    @cached_property
    def only_decodes(self) -> bool:
        """Whether every row runs one token and samples the next."""
        return bool((self.counts == 1).all() and self.samples.all())

    @property
    def shape(self) -> StepShape:
        """Without padding."""
        decodes = int((self.counts == 1).sum())
        return StepShape(int(self.counts.sum()), decodes, len(self.counts) - decodes)

    @cached_property
    def sample_slots(self) -> Ints:
        """[S], slots of the rows that sample."""
        return self.slots[self.samples]

    @cached_property
    def sample_positions(self) -> Ints:
        """[S], where their new tokens go."""
        return self.ends[self.samples]


class StepShape(NamedTuple):
    """Room of a step's inputs: its tokens, rows of one token, and longer rows."""

    tokens: int
    decodes: int
    prefills: int


class Batch:
    """Rows of one worker: at most `max_num_seqs`, each of at most `max_len` tokens.

    Attributes:
        token_ids: [max_num_seqs + 1, max_len + 1] of `token_dtype` on the device.
        block_tables: [max_num_seqs + 1, blocks of max_len + 1 or a few more] int32 on the device; the last row is all
            null blocks.
        padding_slot: the slot of that row.

    `block_stride`: see kv_cache; `token_dtype`: what the device writes best.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_len: int,
        block_size: int,
        transfers: Transfers,
        device: torch.device,
        block_stride: int,
        token_dtype: torch.dtype = torch.int32,
    ) -> None:
        rows = max_num_seqs + 1
        self.block_size = block_size
        self._block_stride = block_stride
        self.padding_slot = max_num_seqs
        self._transfers = transfers
        self.token_ids = torch.zeros(rows, max_len + 1, dtype=token_dtype, device=device)
        width = -(-(-(-max_len // block_size) + 1) // _TABLE_UNIT) * _TABLE_UNIT
        self._tables = np.zeros((rows, width), dtype=np.int32)
        self.block_tables = torch.from_numpy(self._tables).to(device)
        self._table_len: Ints = np.zeros(rows, dtype=np.int64)
        self._num_tokens: Ints = np.zeros(rows, dtype=np.int64)
        self._num_computed: Ints = np.zeros(rows, dtype=np.int64)
        self._num_cached: Ints = np.zeros(rows, dtype=np.int64)
        self._prompt_len: Ints = np.zeros(rows, dtype=np.int64)
        self._wants_prompt = np.zeros(rows, dtype=bool)

    def begin(self, step: Step) -> StepRows:
        """Take in the step's new rows and grown block tables; returns its rows, and counts them as run."""
        self._apply(step)
        slots = np.frombuffer(step.slots, dtype="<i4").astype(np.int64)
        counts = np.frombuffer(step.counts, dtype="<i4").astype(np.int64)
        starts = self._num_computed[slots]
        ends = starts + counts
        rows = StepRows(slots, counts, starts, ends, ends == self._num_tokens[slots])
        self._num_computed[slots] = ends
        self._num_tokens[rows.sample_slots] += 1
        return rows

    def step_arrays(self, rows: StepRows, shape: StepShape) -> list[Array]:
        """A step in a `shape` that holds it, padded, for T tokens and R = decodes + prefills rows.

        Of tokens [T] int64: slots, positions, cache slots; of rows: slots [R] int64, context lengths [R] int32, and
        where their tokens begin, [R + 1] int32.
        """
        decodes, prefills = rows.shape[1:]
        tokens = int(rows.counts.sum())
        place = np.concatenate([np.arange(decodes), shape.decodes + np.arange(prefills)])
        begin = np.cumsum(rows.counts) - rows.counts
        row_of_token = np.repeat(np.arange(len(rows.slots)), rows.counts)
        token_slots = np.full(shape.tokens, self.padding_slot, dtype=np.int64)
        positions = np.zeros(shape.tokens, dtype=np.int64)
        token_slots[:tokens] = rows.slots[row_of_token]
        positions[:tokens] = np.arange(tokens) + (rows.starts - begin)[row_of_token]
        slots = np.full(shape.decodes + shape.prefills, self.padding_slot, dtype=np.int64)
        context_lens = np.zeros(len(slots), dtype=np.int32)
        query_start = np.full(len(slots) + 1, tokens, dtype=np.int32)
        slots[place], context_lens[place], query_start[place] = rows.slots, rows.ends, begin
        cache_slots = self._cache_slots(token_slots, positions)
        return [token_slots, positions, cache_slots, slots, context_lens, query_start]

    def attention(self, inputs: list[torch.Tensor], shape: StepShape, kv_caches: KVCache) -> AttentionBatch:
        """What the model needs of `step_arrays` on the device, without anything on the host."""
        _token_slots, _positions, cache_slots, slots, context_lens, query_start = inputs
        return AttentionBatch(
            slot_mapping=cache_slots,
            block_tables=self.block_tables.index_select(0, slots),
            context_lens=context_lens,
            query_start=query_start,
            num_decodes=shape.decodes,
            host_query_lens=[],
            host_context_lens=[],
            kv_caches=kv_caches,
        )

    def host_attention(self, inputs: list[torch.Tensor], rows: StepRows, kv_caches: KVCache) -> AttentionBatch:
        """The same of a step without padding, with its lengths on the host and tables no wider than they need be."""
        _token_slots, _positions, cache_slots, slots, context_lens, query_start = inputs
        blocks = -(-int(rows.ends.max()) // self.block_size)
        return AttentionBatch(
            slot_mapping=cache_slots,
            block_tables=self.block_tables[:, :blocks].index_select(0, slots),
            context_lens=context_lens,
            query_start=query_start,
            num_decodes=rows.shape.decodes,
            host_query_lens=rows.counts.tolist(),
            host_context_lens=rows.ends.tolist(),
            kv_caches=kv_caches,
        )

    def input_ids(self, token_slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids [T] int64 at these slots and positions."""
        return self.token_ids[token_slots, positions].long()

    def decode_arrays(self, rows: StepRows, size: int) -> list[Array]:
        """A step of decodes as `size` rows, padded: places in the flat token table, slots, positions, cache slots
        (int64), context lengths (int32)."""
        slots = np.full(size, self.padding_slot, dtype=np.int64)
        positions = np.zeros(size, dtype=np.int64)
        slots[: len(rows.slots)], positions[: len(rows.slots)] = rows.slots, rows.starts
        places = slots * self.token_ids.shape[1] + positions
        return [places, slots, positions, self._cache_slots(slots, positions), (positions + 1).astype(np.int32)]

    def append(self, slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put sampled tokens [S] where the next step reads them."""
        self.token_ids[slots, positions] = tokens.to(self.token_ids.dtype)

    def prompt_rows(self, rows: StepRows) -> list[tuple[int, int, int, int]]:
        """(slot, first position, last position, index of the first among the step's tokens) of prompt tokens whose
        successors' log-probabilities are wanted."""
        if not self._wants_prompt[rows.slots].any():
            return []
        query_start = np.cumsum(rows.counts) - rows.counts
        wanted = []
        for index in np.flatnonzero(self._wants_prompt[rows.slots]):
            slot, start = int(rows.slots[index]), int(rows.starts[index])
            last = min(int(rows.ends[index]), int(self._prompt_len[slot]) - 1)
            if start < last:
                wanted.append((slot, start, last, int(query_start[index])))
        return wanted

    # --- inside --------------------------------------------------------------------------------------------

    def _apply(self, step: Step) -> None:
        """Host tables first, then the rows that changed on the device, as far as the longest of them."""
        slots, blocks = np.frombuffer(step.grow_slots, dtype="<i4"), np.frombuffer(step.grow_blocks, dtype="<i4")
        if not (len(slots) or step.new_rows):
            return
        tokens = [self._enter(row) for row in step.new_rows]
        entered = [row.slot for row in step.new_rows]
        for slot, block in zip(slots.tolist(), blocks.tolist(), strict=True):
            self._tables[slot, self._table_len[slot]] = block
            self._table_len[slot] += 1
        changed = np.unique(np.array([*entered, *slots], dtype=np.int64))
        width = int(self._table_len[changed].max())
        arrays: list[Array] = [changed, self._tables[changed, :width]]
        if tokens:
            arrays += [
                np.repeat(entered, [len(part) for part in tokens]).astype(np.int64),
                np.concatenate([np.arange(len(part)) for part in tokens]).astype(np.int64),
                np.concatenate(tokens).astype(np.int32),
            ]
        on_device = self._transfers.upload(arrays)
        self.block_tables[on_device[0], :width] = on_device[1]
        if tokens:
            self.token_ids[on_device[2], on_device[3]] = on_device[4].to(self.token_ids.dtype)

    def _enter(self, row: NewRow) -> Array:
        slot = row.slot
        tokens = np.frombuffer(row.tokens, dtype="<i4")
        blocks = np.frombuffer(row.blocks, dtype="<i4")
        self._tables[slot, : len(blocks)] = blocks
        self._table_len[slot] = len(blocks)
        self._num_tokens[slot] = len(tokens)
        self._num_computed[slot] = row.num_computed
        self._num_cached[slot] = row.num_cached
        self._prompt_len[slot] = row.prompt_len
        self._wants_prompt[slot] = row.params.prompt_logprobs is not None
        return tokens

    def _cache_slots(self, slots: Ints, positions: Ints) -> Ints:
        blocks = self._tables[slots, positions // self.block_size].astype(np.int64)
        places = blocks * self._block_stride + positions % self.block_size
        # a token whose keys are cached already runs only for its logits: it writes to the null block
        places[positions < self._num_cached[slots]] = 0
        return places
