"""One rank of a model, with Ascend's operators or torch's own, over a paged cache that tests fill by hand.

Nothing here imports torch_npu before a rig is made: test modules are collected without it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.models.config import parse_model_config
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import LayerKernels, TorchLayers
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.models.loader import dummy_weights
from nanovllm_dist.models.parallel import Communicator, SingleRank
from nanovllm_dist.models.registry import build_model
from nanovllm_dist.workers import kv_cache
from nanovllm_dist.workers.decode_step import DecodeStep

Operators = Literal["npu", "torch"]
CPU = torch.device("cpu")
BLOCK_SIZE = 128
BLOCKS_PER_ROW = 4
MAX_LEN = BLOCK_SIZE * BLOCKS_PER_ROW


def shape_of(
    architecture: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    head_dim: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """A config.json."""
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim or hidden // heads[0],
        "vocab_size": vocab,
        "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": tied,
    }


QWEN3_06B = shape_of("Qwen3", 1024, 3072, 28, (16, 8), 151936, 128, tied=True)
QWEN3_32B = shape_of("Qwen3", 5120, 25600, 64, (64, 8), 151936, 128)
LLAMA_32_1B = shape_of("Llama", 2048, 8192, 16, (32, 8), 128256, 64, tied=True)
QWEN2_7B = shape_of("Qwen2", 3584, 18944, 28, (28, 4), 152064)
SMALL: dict[str, dict[str, Any]] = {
    "qwen3": shape_of("Qwen3", 256, 512, 2, (4, 2), 5003, 128, tied=True),
    "qwen2": shape_of("Qwen2", 320, 480, 2, (4, 4), 1003),
    "llama": shape_of("Llama", 288, 416, 2, (9, 3), 1003, 64),
}


@dataclass
class Sequence:
    """A request as the cache sees it: tokens, the row of blocks that is its own, and tokens that have been run."""

    tokens: list[int]
    row: int
    computed: int = field(default=0)


class Rig:
    """A rank's model over `rows` rows of blocks, dealt in shuffled order, equal on every rank.

    `weights`: False leaves them as the system hands out memory, for lowering alone. `weights_dtype`: what they are
    rounded to, if not to the dtype that is computed in.
    """

    def __init__(
        self,
        raw: dict[str, Any],
        dtype: torch.dtype = torch.bfloat16,
        operators: Operators = "npu",
        comm: Communicator | None = None,
        rows: int = 8,
        weights: bool = True,
        graph_cache_dir: Path | str = "",
        device: torch.device = CPU,
        weights_dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device
        self.comm = comm or SingleRank()
        self.model_config = parse_model_config(raw)
        self.config = EngineConfig(
            model="m",
            device="npu",
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            tensor_parallel_size=self.comm.world_size,
            max_num_seqs=rows,
            max_model_len=MAX_LEN,
            max_num_batched_tokens=MAX_LEN * rows,
            block_size=BLOCK_SIZE,
            graph_cache_dir=str(graph_cache_dir),
        )
        self.layers = self._layers(operators, dtype)
        self.model = build_model(self.model_config, self.comm, self.layers, dtype, device)
        if weights:
            self._fill(weights_dtype or dtype)
        self.model.finalize()
        self._layout: kv_cache.CacheLayout = "rows" if operators == "npu" else "tokens"
        num_blocks = rows * BLOCKS_PER_ROW + 1
        self.kv_caches = kv_cache.allocate(
            self.model.num_layers,
            num_blocks,
            BLOCK_SIZE,
            self.model.kv_heads,
            self.model.head_dim,
            dtype,
            device,
            layout=self._layout,
        )
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(7)) + 1
        self.block_tables = torch.zeros(rows + 1, BLOCKS_PER_ROW, dtype=torch.int32)
        self.block_tables[:rows] = order.view(rows, BLOCKS_PER_ROW).int()
        self._device_tables = self.block_tables.to(device)
        self.token_ids = torch.zeros(rows + 1, MAX_LEN + 1, dtype=torch.int64, device=device)

    def decode_step(self) -> DecodeStep:
        """The step that becomes a graph, over this rig's tables and cache."""
        from nanovllm_dist.workers.platform.npu_sampler import NpuSampler

        sampler = NpuSampler(self.comm, self.model.lm_head)
        return DecodeStep(self.model, sampler, self.token_ids, self._device_tables, self.kv_caches, None)

    def decode_inputs(self, sequences: list[Sequence], size: int, uniform: float = 0.0) -> list[torch.Tensor]:
        """Inputs of `decode_step` for a token of each sequence, padded to `size`; greedy unless `uniform` is given."""
        padding = size - len(sequences)
        count = len(sequences)
        slots = torch.tensor([sequence.row for sequence in sequences] + [len(self.token_ids) - 1] * padding)
        positions = torch.tensor([sequence.computed for sequence in sequences] + [0] * padding)
        for sequence in sequences:
            self.token_ids[sequence.row, : len(sequence.tokens)] = torch.tensor(sequence.tokens).to(self.device)
        inputs = [
            slots * self.token_ids.shape[1] + positions,
            slots,
            positions,
            torch.cat([self._cache_slots(slots[:count], positions[:count]), slots.new_zeros(padding)]),
            (positions + 1).int(),
            torch.full((size,), 1.0 if uniform else 0.0),
            torch.full((size,), uniform),
        ]
        return [tensor.to(self.device) for tensor in inputs]

    @torch.inference_mode()
    def step(self, rows: list[tuple[Sequence, int]]) -> torch.Tensor:
        """Run `count` tokens of each sequence, single ones first; this rank's logits [tokens, columns] in float32."""
        ids, positions, batch = self.batch(rows)
        logits = self.model.lm_head(self.model.forward(ids, positions, batch)).float()
        for sequence, count in rows:
            sequence.computed += count
        return logits[:, : self.model.lm_head.vocab_size].cpu()

    def batch(self, rows: list[tuple[Sequence, int]]) -> tuple[torch.Tensor, torch.Tensor, AttentionBatch]:
        """(token ids, positions, what attention needs) of such a step."""
        spans = [range(sequence.computed, sequence.computed + count) for sequence, count in rows]
        slots = torch.tensor([sequence.row for (sequence, _), span in zip(rows, spans, strict=True) for _ in span])
        positions = torch.tensor([position for span in spans for position in span])
        ids = [sequence.tokens[position] for (sequence, _), span in zip(rows, spans, strict=True) for position in span]
        counts = [count for _, count in rows]
        lengths = [span.stop for span in spans]
        starts = torch.tensor([0, *counts]).cumsum(0)
        return (
            torch.tensor(ids).to(self.device),
            positions.to(self.device),
            AttentionBatch(
                slot_mapping=self._cache_slots(slots, positions).to(self.device),
                block_tables=self.block_tables[[sequence.row for sequence, _ in rows]].to(self.device),
                context_lens=torch.tensor(lengths, dtype=torch.int32).to(self.device),
                query_start=starts.int().to(self.device),
                num_decodes=sum(count == 1 for count in counts),
                host_query_lens=counts,
                host_context_lens=lengths,
                kv_caches=self.kv_caches,
            ),
        )

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype) -> None:
        """Random weights, made on the CPU. Norms of one and biases as small as weights would hide mistakes."""
        source = build_model(self.model_config, self.comm, TorchLayers(TorchAttention()), dtype, CPU)
        dummy_weights(source, 0)
        for shard in source.shards():
            if len(shard.shape) == 1:
                generator = torch.Generator().manual_seed(len(shard.name))
                noise = 0.1 * torch.randn(shard.shape, generator=generator)
                shard.target.add_(noise[shard.start : shard.end].to(dtype))
        for mine, made in zip(self.model.parameters(), source.parameters(), strict=True):
            mine.copy_(made)

    def _layers(self, operators: Operators, dtype: torch.dtype) -> LayerKernels:
        if operators == "torch":
            return TorchLayers(TorchAttention())
        import torch_npu  # noqa: F401
        from standin import engine, operators

        operators.install()
        engine.install()
        from nanovllm_dist.workers.platform.npu_layers import NpuLayers

        return NpuLayers(self.config, self.model_config, self.comm, dtype, self.device)

    def _cache_slots(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        stride = kv_cache.block_stride(self._layout, BLOCK_SIZE, self.model.kv_heads)
        blocks = self.block_tables[slots, positions // BLOCK_SIZE].long()
        return blocks * stride + positions % BLOCK_SIZE


def random_sequences(lengths: list[int], vocab: int, seed: int = 1) -> list[Sequence]:
    """One sequence of random tokens in each row, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Sequence(torch.randint(vocab, (length,), generator=generator).tolist(), row)
        for row, length in enumerate(lengths)
    ]
