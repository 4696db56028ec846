"""The sampler: one token for each row of logits, once per step, on rank 0.

Order of operations: log-probabilities of the raw logits; masks, biases and penalties; the argmax for greedy rows;
temperature, top-k, top-p, min-p and a counter-based draw for the others. A row pays only for what it asks.
Models, steps and the wire are unknown here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm_dist.wire.messages import TokenLogprobs
from nanovllm_dist.workers.logprobs import pack_logprobs
from nanovllm_dist.workers.sampling_blocks import block_max, first_argmax
from nanovllm_dist.workers.sampling_draw import DrawOptions, draw, draw_filtered
from nanovllm_dist.workers.sampling_edits import edit_row, penalize
from nanovllm_dist.workers.sampling_random import uniform
from nanovllm_dist.workers.sampling_table import NO_LOGPROBS, SamplingTable


@dataclass(frozen=True)
class SampleResult:
    """`token_ids` int64 [R] on the device, in row order; `logprobs` as (slot, logprobs) of rows that asked."""

    token_ids: Tensor
    logprobs: list[tuple[int, TokenLogprobs]]


class Sampler:
    """Samples with the parameters in `table`, which the caller keeps current."""

    def __init__(self, table: SamplingTable) -> None:
        self._table = table

    def sample(
        self, logits: Tensor, slots: NDArray[np.int64], num_tokens: NDArray[np.int64], token_ids: Tensor
    ) -> SampleResult:
        """One token per row: a function of the row's logits, parameters, known tokens, seed and position.

        Args:
            logits: float32 [R, V] on the device; modified in place.
            slots: int64 [R], the slot of each row.
            num_tokens: int64 [R], tokens known before this one, which is the position of the token sampled.
            token_ids: see Batch; a slot's row starts with its known tokens.

        A row whose logits, after masks, hold a NaN or +inf has no distribution: the first such token is taken.
        A row of -inf alone gives token 0. Other rows are not affected.
        """
        asking = np.flatnonzero(self._table.logprobs[slots] != NO_LOGPROBS)
        logprobs = torch.log_softmax(_take(logits, asking), dim=-1) if len(asking) else None
        self._edit(logits, slots, num_tokens, token_ids)
        tokens = self._choose(logits, slots, num_tokens)
        if logprobs is None:
            return SampleResult(tokens, [])
        counts = self._table.logprobs[slots[asking]].tolist()
        packed = pack_logprobs(logprobs, _take(tokens, asking), counts)
        return SampleResult(tokens, list(zip(slots[asking].tolist(), packed, strict=True)))

    def _edit(self, logits: Tensor, slots: NDArray[np.int64], num_tokens: NDArray[np.int64], token_ids: Tensor) -> None:
        table = self._table
        is_short = num_tokens < table.min_length[slots]
        for row in np.flatnonzero(table.edited[slots] | is_short).tolist():
            slot, edits = int(slots[row]), table.edits[slots[row]]
            if edits is not None:
                known = token_ids[slot, : int(num_tokens[row])]
                edit_row(logits[row], edits, known, int(table.prompt_len[slot]), ban_stops=bool(is_short[row]))
        rows = np.flatnonzero(table.penalized[slots])
        if len(rows):
            part = _take(logits, rows)
            penalize(part, table, slots[rows], num_tokens[rows], token_ids)
            if part is not logits:
                logits[_index(rows, logits)] = part

    def _choose(self, logits: Tensor, slots: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> Tensor:
        table = self._table
        maxima = block_max(logits)
        tokens = first_argmax(logits, maxima)
        random, filtered = ~table.greedy[slots], table.filtered[slots]
        for draw_rows, rows in (
            (draw_filtered, np.flatnonzero(random & filtered)),
            (draw, np.flatnonzero(random & ~filtered)),
        ):
            if len(rows):
                part = _take(maxima, rows)
                drawn = draw_rows(_take(logits, rows), part, self._options(slots[rows], num_tokens[rows]))
                drawn = torch.where(part.amax(-1).isfinite(), drawn, _take(tokens, rows))
                if len(rows) == len(tokens):
                    return drawn
                tokens[_index(rows, logits)] = drawn
        return tokens

    def _options(self, slots: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> DrawOptions:
        table = self._table
        return DrawOptions(
            temperature=table.temperature[slots],
            top_k=table.top_k[slots],
            top_p=table.top_p[slots],
            min_p=table.min_p[slots],
            uniform=uniform(table.seed[slots], num_tokens),
        )


def _index(rows: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def _take(tensor: Tensor, rows: NDArray[np.int64]) -> Tensor:
    """These ascending rows; the tensor itself, uncopied, when they are all of them."""
    return tensor if len(rows) == len(tensor) else tensor[_index(rows, tensor)]
