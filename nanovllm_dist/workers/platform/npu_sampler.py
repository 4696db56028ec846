"""Sampling over a vocabulary that is cut over ranks, from operators that an Ascend graph takes.

Each rank exchanges its largest logit and the masses of 2,048 logits at a time, not the logits. The chunk that holds
the drawn token is found by every rank alike; the rank that owns it looks inside and tells the others.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm_dist.models.layers.embedding import LMHead
from nanovllm_dist.models.parallel import Communicator

# Sums of so many masses round little, and a chunk is looked through at no cost
_CHUNK = 2048


class NpuSampler:
    """A DeviceSampler."""

    uniform_dtype = np.float32  # float64 is emulated on the device's scalar cores

    def __init__(self, comm: Communicator, head: LMHead) -> None:
        self._comm = comm
        self._vocab_start = head.vocab_start
        self._vocab_size = head.vocab_size
        self._chunks = -(-head.columns // _CHUNK)

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler; float32 uniforms."""
        own = (logits if self._vocab_size == logits.shape[1] else logits[:, : self._vocab_size]).float()
        top, index = own.max(-1)
        masses = self._masses((own - top.unsqueeze(1)) * inv_temperature.unsqueeze(1))
        token = (index + self._vocab_start).float()  # exact below 2^24
        statistics = torch.cat([top.unsqueeze(1), token.unsqueeze(1), masses.sum(-1)], dim=1)
        tops, tokens, sums = self._comm.all_gather(statistics).split([1, 1, self._chunks], dim=-1)
        greatest, winner = tops.max(0)
        greedy = tokens.gather(0, winner.unsqueeze(0)).view(-1)
        scales = torch.exp((tops - greatest) * inv_temperature.unsqueeze(1))
        all_sums = (sums * scales).transpose(0, 1).reshape(len(logits), -1)
        until = all_sums.cumsum(-1)
        threshold = uniforms.unsqueeze(1) * until[:, -1:]
        chunk, before = _find(all_sums, until, threshold)
        rest = (threshold - before) / scales[self._comm.rank]
        drawn = self._inside(masses, chunk, rest)
        return torch.where(inv_temperature == 0, greedy, drawn).long()

    def append(self, table: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See DeviceSampler. Read back, or a graph would return the table instead of writing to it and no more."""
        behind = places + 1
        torch.ops.npu.npu_scatter_nd_update_(table, behind.unsqueeze(1), tokens)
        return table.index_select(0, behind)

    def _masses(self, scaled: torch.Tensor) -> torch.Tensor:
        """exp of [rows, vocab of this rank], as [rows, chunks, _CHUNK] with zeros behind the last."""
        padding = self._chunks * _CHUNK - self._vocab_size
        return F.pad(torch.exp(scaled), (0, padding)).view(len(scaled), self._chunks, _CHUNK)

    def _inside(self, masses: torch.Tensor, chunk: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """The token at mass `rest` of a `chunk`, which counts over all ranks, all [rows, 1]: float32 [rows], the same
        on every rank."""
        local = chunk - self._comm.rank * self._chunks
        mine = (local >= 0) & (local < self._chunks)
        at = local.clamp(0, self._chunks - 1).unsqueeze(2).expand(-1, 1, _CHUNK)
        chosen = masses.gather(1, at).squeeze(1)
        place, _before = _find(chosen, chosen.cumsum(-1), rest)
        token = (local * _CHUNK + place + self._vocab_start).float()
        return self._comm.all_reduce(torch.where(mine, token, 0.0)).view(-1)


def _find(masses: torch.Tensor, until: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of [rows, N] masses up to which there is more than `threshold` [rows, 1], and how much there is before
    it; both [rows, 1]. `until`: their sums. Never one behind the last that adds anything, whatever rounding does."""
    before = (until <= threshold) & (until < until[:, -1:])
    index = before.float().sum(-1, keepdim=True).long()
    return index, until.gather(1, index) - masses.gather(1, index)
