"""The vocabulary cut over ranks: token embeddings on the way in, logits on the way out, one shared weight if tied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.layers.linear_kernel import LinearKernel
from nanovllm_dist.models.layers.shard import Shard, empty_parameter
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import balanced_range


class VocabWeight(nn.Module):
    """This rank's rows of a [vocab, hidden] tensor, with zero rows below up to the largest rank's count."""

    def __init__(
        self, name: str, vocab: int, hidden: int, comm: Communicator, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._name = name
        self._shape = (vocab, hidden)
        self.ranges = [balanced_range(vocab, comm.world_size, rank) for rank in range(comm.world_size)]
        self.start, self.end = self.ranges[comm.rank]
        padded_rows = max(end - start for start, end in self.ranges)
        self.weight = empty_parameter(padded_rows, hidden, dtype=dtype, device=device)
        self.weight[self.end - self.start :].zero_()

    def release(self) -> None:
        """Give the memory back, when a repacked copy does all the work."""
        self.weight = empty_parameter(0, self._shape[1], dtype=self.weight.dtype, device=self.weight.device)

    def shards(self) -> Iterator[Shard]:
        """This rank's rows."""
        rows = self.weight[: self.end - self.start]
        yield Shard(self._name, rows, self._shape, 0, self.start, self.end)


class VocabEmbedding(nn.Module):
    """Token ids [T] -> embeddings [T, hidden], equal on all ranks."""

    def __init__(self, rows: VocabWeight, comm: Communicator) -> None:
        super().__init__()
        self._rows = rows
        self._comm = comm

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See the class; ids are int32 or int64 in [0, vocab)."""
        if self._comm.world_size == 1:
            return F.embedding(input_ids, self._rows.weight)
        elsewhere = (input_ids < self._rows.start) | (input_ids >= self._rows.end)
        local_ids = (input_ids - self._rows.start).masked_fill(elsewhere, 0)
        embeddings = F.embedding(local_ids, self._rows.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        return self._comm.all_reduce(embeddings)


class LMHead(nn.Module):
    """From hidden states to logits; each rank makes those of its own range of the vocabulary.

    Attributes:
        vocab_start, vocab_size: the range of this rank.
        columns: of the logits, equal on all ranks; those behind `vocab_size` are padding.
    """

    def __init__(self, rows: VocabWeight, tied: bool, comm: Communicator) -> None:
        super().__init__()
        self._rows = rows
        self._tied = tied
        self._comm = comm
        self._kernel: LinearKernel | None = None
        self.vocab_start, self.vocab_size = rows.start, rows.end - rows.start
        self.columns = len(rows.weight)

    @property
    def kernel(self) -> LinearKernel | None:
        """What `finalize` made of the weight."""
        return self._kernel

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, hidden] -> this rank's logits [N, columns] in the model's dtype, written to `out` if given."""
        if self._kernel is not None:
            return self._kernel(hidden, out)
        weight = self._rows.weight
        return F.linear(hidden, weight) if out is None else torch.mm(hidden, weight.t(), out=out)

    def gather(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Every rank's logits -> [N, vocab] in their dtype on rank 0, None elsewhere. May share `logits`' memory."""
        parts = self._comm.gather(logits)
        if parts is None:
            return None
        known = [part[:, : end - start] for part, (start, end) in zip(parts, self._rows.ranges, strict=True)]
        return known[0] if len(known) == 1 else torch.cat(known, dim=-1)

    def finalize(self, kernels: LayerKernels) -> None:
        """Repack the weight for the device; after loading. The plain one stays only if the embedding needs it."""
        self._kernel = kernels.pack_linear(self._rows.weight, None)
        if self._kernel is not None and not self._tied:
            self._rows.release()
