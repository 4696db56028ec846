"""Changes to logits before a token is chosen: masks, biases and penalties, on the rows that ask for them.

Everything works in place and waits for no device result. Temperature and the draw itself are elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm_dist.workers.sampling_table import BannedSequences, LogitEdits, SamplingTable

_BANNED = float("-inf")
# Allowed tokens stay above banned ones even if the model itself gives them -inf
_LEAST_ALLOWED = -1e30


def edit_row(row: Tensor, edits: LogitEdits, known: Tensor, prompt_len: int, *, ban_stops: bool) -> None:
    """Apply one request's masks and biases to its logits `row` float32 [V], in place.

    `known` int32 [n] holds prompt and output so far. When the bans leave no token at all they are lifted, so
    that what `allowed_token_ids` says still holds and some token can be returned.
    """
    if edits.forbidden is not None:
        row.clamp_(min=_LEAST_ALLOWED).masked_fill_(edits.forbidden, _BANNED)
    bans_stops = ban_stops and edits.early_stops is not None
    if edits.banned is not None or bans_stops:
        before = row.clone()
        if edits.banned is not None:
            _ban_sequences(row, edits.banned, known, prompt_len)
        if bans_stops and edits.early_stops is not None:
            row.index_fill_(0, edits.early_stops, _BANNED)
        row.copy_(torch.where(row.amax().isneginf(), before, row))
    if edits.bias_ids is not None and edits.bias_values is not None:
        row.index_add_(0, edits.bias_ids, edits.bias_values)


def penalize(
    logits: Tensor, table: SamplingTable, slots: NDArray[np.int64], lengths: NDArray[np.int64], token_ids: Tensor
) -> None:
    """Apply repetition, frequency and presence penalties to `logits` float32 [P, V], in place.

    `slots` and `lengths` int64 [P]: each row's slot and its count of known tokens, at least 1; `token_ids`: see
    Batch. Repetition looks at prompt and output, the other two at the output only.
    """
    device = logits.device

    def column(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(device).unsqueeze(1)

    width = int(lengths.max())
    positions = torch.arange(width, device=device)
    tokens = token_ids[torch.from_numpy(slots).to(device), :width].to(torch.int64)
    is_known = positions < column(lengths)
    is_output = is_known & (positions >= column(table.prompt_len[slots]))
    # past its end a row repeats its first token: every copy of a token gets the same new logit, so writing it
    # more than once changes nothing
    tokens = torch.where(is_known, tokens, tokens[:, :1])
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, is_output.float()).gather(1, tokens)
    values = logits.gather(1, tokens)
    repetition = column(table.repetition_penalty[slots])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= counts * column(table.frequency_penalty[slots])
    values -= (counts > 0) * column(table.presence_penalty[slots])
    logits.scatter_(1, tokens, values)


def _ban_sequences(row: Tensor, banned: BannedSequences, known: Tensor, prompt_len: int) -> None:
    # a sequence counts only where all of it lies in the output: longer prefixes than that cannot match yet
    fitting = bisect_right(banned.prefix_lengths, len(known) - prompt_len)
    if not fitting:
        return
    longest = banned.prefix_lengths[fitting - 1]
    prefixes = banned.prefixes[:fitting, banned.prefixes.shape[1] - longest :]
    tail = known[len(known) - longest :]
    matches = ((prefixes == tail) | (prefixes < 0)).all(-1)
    row.index_add_(0, banned.last[:fitting], torch.where(matches, _BANNED, 0.0))
