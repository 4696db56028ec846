"""Sampling over a vocabulary that is cut over ranks: statistics of each part are exchanged, not logits."""

from __future__ import annotations

import torch

from nanovllm_dist.models.layers.embedding import LMHead
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.kernels.sampling import choose, num_chunks, shard_statistics


class ShardedSampler:
    """A DeviceSampler; on the current stream."""

    def __init__(self, comm: Communicator, head: LMHead) -> None:
        self._comm = comm
        self._vocab_start = head.vocab_start
        self._vocab_size = head.vocab_size

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler."""
        rows, columns = logits.shape
        own = torch.empty(rows, num_chunks(columns), 2, dtype=torch.float32, device=logits.device)
        shard_statistics(logits, inv_temperature, own, vocab_local=self._vocab_size)
        tokens = choose(
            self._comm.all_gather(own),
            logits,
            uniforms,
            inv_temperature,
            torch.empty(rows, dtype=torch.int64, device=logits.device),
            rank=self._comm.rank,
            vocab_start=self._vocab_start,
            vocab_local=self._vocab_size,
        )
        return self._comm.all_reduce(tokens)
