"""A slow sampler of one row in float64 numpy, written from the documented meaning of each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from nanovllm_dist.sampling_params import SamplingParams
from nanovllm_dist.workers.sampler import Sampler, SampleResult
from nanovllm_dist.workers.sampling_table import SamplingTable

Words = Sequence[Sequence[int]]


def run_sampler(
    logits: NDArray[np.float32],
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    known: Sequence[Sequence[int]],
    prompt_len: Sequence[int],
    bad_words: Sequence[Words] | None = None,
    eos: Sequence[int] = (),
) -> SampleResult:
    """The real sampler on R requests in slots 0..R-1."""
    count, vocab_size = logits.shape
    table = SamplingTable(count, vocab_size, eos, "cpu")
    token_ids = torch.zeros(count, max(len(tokens) for tokens in known) + 1, dtype=torch.int32)
    for slot in range(count):
        table.set(slot, params[slot], seeds[slot], prompt_len[slot], bad_words[slot] if bad_words else [])
        token_ids[slot, : len(known[slot])] = torch.tensor(known[slot], dtype=torch.int32)
    lengths = np.array([len(tokens) for tokens in known])
    return Sampler(table).sample(torch.from_numpy(logits.copy()), np.arange(count), lengths, token_ids)


def edited_logits(
    logits: NDArray[np.float32],
    params: SamplingParams,
    known: Sequence[int],
    prompt_len: int,
    bad_words: Words = (),
    eos: Sequence[int] = (),
) -> NDArray[np.float64]:
    """Logits after masks, biases and penalties."""
    x = logits.astype(np.float64).copy()
    output = list(known[prompt_len:])
    if params.allowed_token_ids is not None:
        for token in range(len(x)):
            if token not in params.allowed_token_ids:
                x[token] = -np.inf
    for word in bad_words:
        prefix = list(word[:-1])
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in [*params.stop_token_ids, *([] if params.ignore_eos else eos)]:
            x[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(known):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def final_distribution(logits: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Probabilities after temperature, top-k, top-p and min-p; equal logits are ordered by token id."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-logits, kind="stable")
    if params.top_k > 0:
        weights[order[params.top_k :]] = 0.0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    beyond = before >= params.top_p
    beyond[0] = False
    if params.top_p < 1.0:
        weights[order[beyond]] = 0.0
    weights[weights < params.min_p * weights.max()] = 0.0
    return weights / weights.sum()


def inverse_cdf(probabilities: NDArray[np.float64], uniform: float) -> int:
    """The first token whose cumulative probability exceeds `uniform`."""
    return int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
