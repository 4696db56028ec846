"""Runs the real model over a real paged cache, on one rank or on several as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from nanovllm_dist.models.config import read_model_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.loader import load_weights
from nanovllm_dist.models.parallel import Communicator, SingleRank
from nanovllm_dist.models.registry import build_model

T = TypeVar("T")
CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 64


class ThreadGroup:
    """What the ranks of one group share: a place for each rank's tensor, and a barrier."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * world_size


class ThreadCommunicator:
    """A Communicator whose ranks are threads."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.world_size = group.world_size

    def reduce_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        return None

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        parts = self._exchange(tensor)
        assert len({part.shape for part in parts}) == 1, "gather needs equal shapes"
        return parts if self.rank == 0 else None

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._exchange(tensor)[0])

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._group.slots[self.rank] = tensor.clone()
        self._group.barrier.wait()
        parts = list(self._group.slots)
        self._group.barrier.wait()
        return parts


def run_ranks(world_size: int, work: Callable[[Communicator], T]) -> list[T]:
    """`work` on every rank of a group at once; their results in rank order."""
    if world_size == 1:
        return [work(SingleRank())]
    group = ThreadGroup(world_size)

    def rank_main(rank: int) -> T:
        try:
            return work(ThreadCommunicator(group, rank))
        except BaseException:
            group.barrier.abort()  # or the other ranks would wait for this one
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(rank_main, rank) for rank in range(world_size)]
    failures = [future.exception() for future in futures if future.exception() is not None]
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return [future.result() for future in futures]


@dataclass
class Sequence:
    """A request as the cache sees it: its tokens, its blocks, and how many tokens have been run."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class PagedModel:
    """One rank's model with a cache; blocks are dealt in shuffled order, the same on every rank."""

    def __init__(
        self,
        model_dir: Path,
        comm: Communicator,
        dtype: torch.dtype = torch.float32,
        finalize: bool = True,
    ) -> None:
        self.model = build_model(read_model_config(model_dir), comm, TorchLayers(TorchAttention()), dtype, CPU)
        load_weights(self.model, model_dir)
        if finalize:
            self.model.finalize()
        shape = (NUM_BLOCKS, BLOCK_SIZE, self.model.kv_heads, self.model.head_dim)
        self.caches = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(self.model.num_layers)
        ]
        order = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(7)) + 1
        self._free = order.tolist()

    def step(self, rows: list[tuple[Sequence, int]], padding: int = 0) -> list[torch.Tensor] | None:
        """Run `count` tokens of each sequence, one-token rows first; float32 logits [count, vocab] of each row."""
        input_ids, positions, batch = self._batch(rows, padding)
        with torch.inference_mode():
            hidden = self.model.forward(input_ids, positions, batch)
            logits = self.model.compute_logits(hidden[: len(hidden) - padding])
        for sequence, count in rows:
            sequence.computed += count
        return None if logits is None else list(logits.split([count for _, count in rows]))

    def logits(self, tokens: list[int], chunk: int | None = None) -> torch.Tensor | None:
        """Logits [len(tokens), vocab] of every position, prefilled whole or `chunk` tokens at a time."""
        sequence, parts = Sequence(tokens), []
        while sequence.computed < len(tokens):
            outputs = self.step([(sequence, min(chunk or len(tokens), len(tokens) - sequence.computed))])
            if outputs is not None:
                parts += outputs
        return torch.cat(parts) if parts else None

    def _batch(
        self, rows: list[tuple[Sequence, int]], padding: int
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        input_ids, positions, slots, starts = [], [], [], [0]
        for sequence, count in rows:
            span = range(sequence.computed, sequence.computed + count)
            while len(sequence.blocks) * BLOCK_SIZE < span.stop:
                sequence.blocks.append(self._free.pop())
            input_ids += [sequence.tokens[position] for position in span]
            positions += span
            slots += [sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            starts.append(starts[-1] + count)
        widest = max(len(sequence.blocks) for sequence, _ in rows)
        tables = [sequence.blocks + [0] * (widest - len(sequence.blocks)) for sequence, _ in rows]
        counts = [count for _, count in rows]
        lengths = [sequence.computed + count for sequence, count in rows]
        num_decodes = next((index for index, count in enumerate(counts) if count > 1), len(counts))
        batch = AttentionBatch(
            slot_mapping=torch.tensor(slots + [0] * padding),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            num_decodes=num_decodes,
            host_query_lens=counts,
            host_context_lens=lengths,
            kv_caches=self.caches,
        )
        return torch.tensor(input_ids + [0] * padding), torch.tensor(positions + [0] * padding), batch
