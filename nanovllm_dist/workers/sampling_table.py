"""Sampling parameters of every slot, in arrays that live as long as the worker.

A request that enters a slot overwrites all of it. The flags say, without looking at any tensor, which rows of a
step ask for something beyond an argmax or a plain draw. Logits and steps are unknown here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm_dist.sampling_params import SamplingParams

NO_LOGPROBS = -1
# Below this, float32 logits of different value have nothing left between them, and 1 / temperature overflows
_MIN_TEMPERATURE = 1e-6
_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True)
class BannedSequences:
    """Token sequences whose last token is banned after the others: W of them, by ascending prefix length.

    `last` int64 [W] and `prefixes` int32 [W, P] are on the device; prefixes are right-aligned, -1 fills the left.
    """

    last: Tensor
    prefixes: Tensor
    prefix_lengths: list[int]


@dataclass(frozen=True)
class LogitEdits:
    """What one request changes about single logits; ids are int64 tensors on the device, None if not asked for.

    `forbidden` bool [V] is what `allowed_token_ids` leaves out: a mask, because a list may be as long as the vocabulary
    and what these take is not measured before the cache takes the rest. With the limits of `SamplingParams` and of the
    coordinator it is less than a megabyte. `early_stops` are banned until the request has its `min_tokens`.
    """

    forbidden: Tensor | None
    banned: BannedSequences | None
    early_stops: Tensor | None
    bias_ids: Tensor | None
    bias_values: Tensor | None


class SamplingTable:
    """Per-slot parameters as numpy arrays [max_num_seqs], indexed by slot; see `SamplingParams` for meanings.

    `greedy`, `filtered` (top-k or top-p), `penalized`, `edited` (LogitEdits at every step) are flags;
    `special` is any of the last three, min-p or log-probabilities: more than an argmax or a plain draw.
    `min_length` is the length below which stop tokens are banned; `logprobs` is NO_LOGPROBS where none are wanted.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device | str
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self.greedy = np.ones(max_num_seqs, dtype=np.bool_)
        self.filtered = np.zeros(max_num_seqs, dtype=np.bool_)
        self.penalized = np.zeros(max_num_seqs, dtype=np.bool_)
        self.edited = np.zeros(max_num_seqs, dtype=np.bool_)
        self.min_length = np.zeros(max_num_seqs, dtype=np.int64)
        self.logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int64)
        self._prompt_logprobs = [0] * max_num_seqs
        self.seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self.prompt_len = np.zeros(max_num_seqs, dtype=np.int64)
        self.temperature = np.ones(max_num_seqs, dtype=np.float32)
        self.inv_temperature = np.zeros(max_num_seqs, dtype=np.float32)  # 0 where greedy
        self.special = np.zeros(max_num_seqs, dtype=np.bool_)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self.top_p = np.ones(max_num_seqs, dtype=np.float64)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self.repetition_penalty = np.ones(max_num_seqs, dtype=np.float32)
        self.frequency_penalty = np.zeros(max_num_seqs, dtype=np.float32)
        self.presence_penalty = np.zeros(max_num_seqs, dtype=np.float32)
        self.edits: list[LogitEdits | None] = [None] * max_num_seqs

    def set(
        self, slot: int, params: SamplingParams, seed: int, prompt_len: int, bad_words: Sequence[Sequence[int]]
    ) -> None:
        """Write the parameters of the request that enters `slot`; nothing of the one before it stays.

        `seed` is any 64-bit integer, signed or not; `prompt_len` counts the tokens before the first output;
        `bad_words` are token-id sequences. Ids outside the vocabulary can never be drawn and are dropped.
        """
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.greedy[slot] = params.greedy
        self.temperature[slot] = max(params.temperature, _MIN_TEMPERATURE)
        self.top_k[slot] = top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.filtered[slot] = top_k > 0 or params.top_p < 1.0
        self.repetition_penalty[slot] = params.repetition_penalty
        self.frequency_penalty[slot] = params.frequency_penalty
        self.presence_penalty[slot] = params.presence_penalty
        self.penalized[slot] = (
            params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        self.logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self._prompt_logprobs[slot] = params.prompt_logprobs or 0
        self.seed[slot] = seed & _UINT64_MASK
        self.prompt_len[slot] = prompt_len
        self.min_length[slot] = prompt_len + params.min_tokens
        self.edited[slot] = bool(params.allowed_token_ids is not None or bad_words or params.logit_bias)
        self.edits[slot] = self._edits(params, bad_words) if self.edited[slot] or params.min_tokens else None

        self.inv_temperature[slot] = 0.0 if params.greedy else 1.0 / self.temperature[slot]
        self.special[slot] = bool(
            self.filtered[slot]
            or self.penalized[slot]
            or self.edited[slot]
            or params.min_p > 0
            or params.logprobs is not None
        )

    def special_rows(self, slots: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of these rows, of `num_tokens` known tokens each, ask for more than an argmax or a plain draw."""
        return np.flatnonzero(self.special[slots] | (num_tokens < self.min_length[slots]))

    def prompt_logprobs_of(self, slot: int) -> int:
        """How many of the likeliest tokens `slot` wants beside each prompt token; 0 also where it wants none."""
        return self._prompt_logprobs[slot]

    def _edits(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> LogitEdits:
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids))
        bias = {token: value for token, value in (params.logit_bias or {}).items() if token < self.vocab_size}
        return LogitEdits(
            forbidden=None if params.allowed_token_ids is None else self._all_but(params.allowed_token_ids),
            banned=self._banned(bad_words),
            early_stops=self._ids(stops) if params.min_tokens else None,
            bias_ids=self._ids(bias) if bias else None,
            bias_values=torch.tensor(list(bias.values()), dtype=torch.float32).to(self.device) if bias else None,
        )

    def _all_but(self, ids: Iterable[int]) -> Tensor:
        mask = np.ones(self.vocab_size, dtype=np.bool_)
        mask[self._known(ids)] = False
        return torch.from_numpy(mask).to(self.device)

    def _ids(self, ids: Iterable[int]) -> Tensor:
        return torch.tensor(self._known(ids), dtype=torch.int64).to(self.device)

    def _known(self, ids: Iterable[int]) -> list[int]:
        return [token for token in dict.fromkeys(ids) if 0 <= token < self.vocab_size]

    def _banned(self, bad_words: Sequence[Sequence[int]]) -> BannedSequences | None:
        words = [word for word in bad_words if word and all(0 <= token < self.vocab_size for token in word)]
        if not words:
            return None
        words.sort(key=len)
        widest = len(words[-1]) - 1
        prefixes = [[-1] * (widest - len(word) + 1) + list(word[:-1]) for word in words]
        return BannedSequences(
            last=torch.tensor([word[-1] for word in words], dtype=torch.int64).to(self.device),
            prefixes=torch.tensor(prefixes, dtype=torch.int32).reshape(len(words), widest).to(self.device),
            prefix_lengths=[len(word) - 1 for word in words],
        )
