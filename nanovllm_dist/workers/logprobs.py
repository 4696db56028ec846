"""Log-probabilities as users see them: of the unmodified logits, packed for the wire.

Which rows want them, and when, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm_dist.wire.messages import TokenLogprobs
from nanovllm_dist.workers.sampling_blocks import block_max, split_keys, top_keys

# Bounds the memory of one prompt's log-softmax: this many rows of the vocabulary at a time
_ROWS_AT_ONCE = 64


def pack_logprobs(logprobs: Tensor, chosen: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Pack the chosen token and the `counts[i]` likeliest ones of each row; waits for the device.

    `logprobs` float32 [N, V], `chosen` int64 [N]. Equal values are ordered by id; the rank of the chosen token is
    one more than the number of tokens above it.
    """
    column = chosen.unsqueeze(1)
    value = logprobs.gather(1, column)
    rank = (1 + (logprobs > value).sum(-1)).tolist()
    top_values, top_ids = split_keys(top_keys(logprobs, block_max(logprobs), max(counts)))
    ids = torch.cat((column, top_ids), dim=1).cpu().numpy().astype("<i4")
    values = torch.cat((value, top_values), dim=1).cpu().numpy().astype("<f4")
    return [
        TokenLogprobs(ids[row, : count + 1].tobytes(), values[row, : count + 1].tobytes(), rank[row])
        for row, count in enumerate(counts)
    ]


def prompt_logprobs(logits: Tensor, target_ids: Tensor, k: int) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt tokens `target_ids` int64 [N] under `logits` [N, V], with the top `k`."""
    packed: list[TokenLogprobs] = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        logprobs = torch.log_softmax(logits[rows].float(), dim=-1)
        packed += pack_logprobs(logprobs, target_ids[rows].to(torch.int64), [k] * len(logprobs))
    return packed
