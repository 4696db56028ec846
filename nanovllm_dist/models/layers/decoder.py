"""The decoder-only language model that the model files specialise: embeddings, pre-norm layers, logits.

One step is a function of its arguments: nothing is kept between steps but the caches in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention import Attention
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.embedding import LMHead, VocabEmbedding, VocabWeight
from nanovllm_dist.models.layers.kernels import LayerKernels
from nanovllm_dist.models.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm_dist.models.layers.mlp import MLP
from nanovllm_dist.models.layers.norm import RMSNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding
from nanovllm_dist.models.layers.shard import Shard
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import split_heads


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        qk_norm: bool,
        comm: Communicator,
        kernels: LayerKernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        prefix, size, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(f"{prefix}.input_layernorm.weight", size, eps, kernels, dtype, device)
        self.attention = Attention(f"{prefix}.self_attn", index, config, qk_norm, comm, kernels, dtype, device)
        self.mlp_norm = RMSNorm(f"{prefix}.post_attention_layernorm.weight", size, eps, kernels, dtype, device)
        self.mlp = MLP(f"{prefix}.mlp", config, comm, kernels, dtype, device)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, batch: AttentionBatch, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) [T, hidden] -> the same; their sum is the hidden state. The first layer has no residual."""
        normed, residual = self.input_norm(x, residual)
        normed, residual = self.mlp_norm(self.attention(normed, batch, plan), residual)
        return self.mlp(normed), residual

    def shards(self) -> Iterator[Shard]:
        """Tensors of this layer."""
        for part in (self.input_norm, self.attention, self.mlp_norm, self.mlp):
            yield from part.shards()


class FusedLayers(Protocol):
    """All layers and the final norm in a way of the device's own, for the steps that it takes."""

    def takes(self, batch: AttentionBatch) -> bool:
        """Whether it runs such a step."""
        ...

    def __call__(self, hidden: torch.Tensor, batch: AttentionBatch, plan: Any) -> torch.Tensor:
        """Embeddings [T, hidden] -> hidden states [T, hidden] after the final norm, keys and values stored."""
        ...


class DecoderLM(nn.Module):
    """One rank of a decoder-only language model.

    Parameters are allocated, not initialised: fill them with `loader.load_weights` or `loader.dummy_weights`,
    then call `finalize` once. None of them requires gradients.

    Attributes:
        num_layers: decoder layers, each with a cache in `AttentionBatch.kv_caches`.
        kv_heads: key/value heads of this rank.
        head_dim: size of a head.
        unused_tensors: patterns of checkpoint tensors that are not read.
        fused: what runs some of the steps instead of the layers; None, if the device has nothing of the kind.

    Raises:
        ConfigError: the group has more ranks than query heads allow.
    """

    qk_norm: ClassVar[bool] = False

    def __init__(
        self,
        config: ModelConfig,
        comm: Communicator,
        kernels: LayerKernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.kv_heads = split_heads(config.num_heads, config.num_kv_heads, comm.world_size, comm.rank).num_kv_heads
        self.head_dim = config.head_dim
        self.unused_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
        self.fused: FusedLayers | None = None
        self._kernels = kernels
        vocab, size = config.vocab_size, config.hidden_size
        self.vocab = VocabWeight("model.embed_tokens.weight", vocab, size, comm, dtype, device)
        self.output_vocab = self.vocab
        if config.tie_word_embeddings:
            self.unused_tensors += ("lm_head.weight",)
        else:
            self.output_vocab = VocabWeight("lm_head.weight", vocab, size, comm, dtype, device)
        self.embedding = VocabEmbedding(self.vocab, comm)
        self.rotary = RotaryEmbedding(config, device)
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(index, config, self.qk_norm, comm, kernels, dtype, device)
            for index in range(config.num_layers)
        )
        self.norm = RMSNorm("model.norm.weight", size, config.rms_norm_eps, kernels, dtype, device)
        self.lm_head = LMHead(self.output_vocab, config.tie_word_embeddings, comm)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """input_ids [T] int32 or int64, positions [T] int64 -> hidden states [T, hidden] after the final norm, equal on
        all ranks."""
        plan = self._kernels.prepare(batch, positions, self.rotary)
        hidden, residual = self.embedding(input_ids), None
        if self.fused is not None and self.fused.takes(batch):
            return self.fused(hidden, batch, plan)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, batch, plan)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [N, hidden] -> logits [N, vocab] in float32 on rank 0, None elsewhere. Every rank must call it."""
        logits = self.lm_head.gather(self.lm_head(hidden))
        return None if logits is None else logits.float()

    def shards(self) -> Iterator[Shard]:
        """Every checkpoint tensor of the model, once, with this rank's part. Not after `finalize`."""
        yield from self.vocab.shards()
        for layer in self.layers:
            yield from layer.shards()
        yield from self.norm.shards()
        if self.output_vocab is not self.vocab:
            yield from self.output_vocab.shards()

    def finalize(self) -> None:
        """Repack weights for the device. Call once, when they are loaded."""
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear | LMHead):
                module.finalize(self._kernels)
