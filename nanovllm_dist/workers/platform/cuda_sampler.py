"""Sampling over a vocabulary that is cut over ranks: statistics of each part are exchanged, not logits."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm_dist.models.layers.embedding import LMHead
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.kernels.sampling import append_tokens, choose, num_chunks, shard_statistics


class ShardedSampler:
    """A DeviceSampler; on the current stream."""

    uniform_dtype = np.float64

    def __init__(self, comm: Communicator, head: LMHead) -> None:
        self._comm = comm
        self._vocab_start = head.vocab_start
        self._vocab_size = head.vocab_size

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler."""
        statistics = self._comm.all_gather(self._statistics(logits, inv_temperature))
        return self._comm.all_reduce(self._choose(statistics, logits, inv_temperature, uniforms))

    def append(self, table: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler."""
        return append_tokens(table, places, tokens)

    def rehearse(self, logits: torch.Tensor) -> None:
        """Launch what `sample` and `append` launch, without talking to other ranks."""
        inv_temperature = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        own = self._statistics(logits, inv_temperature)
        statistics = own.unsqueeze(0).repeat(self._comm.world_size, 1, 1, 1)
        tokens = self._choose(statistics, logits, inv_temperature, inv_temperature.double())
        table = torch.zeros(len(logits) + 1, dtype=torch.int32, device=logits.device)
        self.append(table, torch.arange(len(logits), device=logits.device), tokens)

    def _statistics(self, logits: torch.Tensor, inv_temperature: torch.Tensor) -> torch.Tensor:
        rows, columns = logits.shape
        own = torch.empty(rows, num_chunks(columns), 2, dtype=torch.float32, device=logits.device)
        return shard_statistics(logits, inv_temperature, own, vocab_local=self._vocab_size)

    def _choose(
        self, statistics: torch.Tensor, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        return choose(
            statistics,
            logits,
            uniforms,
            inv_temperature,
            torch.empty(len(logits), dtype=torch.int64, device=logits.device),
            rank=self._comm.rank,
            vocab_start=self._vocab_start,
            vocab_local=self._vocab_size,
        )
