"""The layers of several ranks with two launches less in each: what sums a product over the ranks also adds the residual
and norms.

What is left of a layer are four products, the rotation, attention, the activation unless rows are few, and two sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLayer, DecoderLM
from nanovllm_dist.models.layers.linear import RowParallelLinear
from nanovllm_dist.models.layers.norm import RMSNorm
from nanovllm_dist.workers.platform.cuda_decoder import linear_kernel
from nanovllm_dist.workers.platform.cuda_layers import Plan, TritonLayers
from nanovllm_dist.workers.platform.cuda_linear import CudaLinear
from nanovllm_dist.workers.platform.cuda_sum_norm import SumNorm


class _Layer(NamedTuple):
    layer: DecoderLayer
    gate_up: CudaLinear
    next_norm: RMSNorm


class JoinedNorms:
    """FusedLayers of a loaded and finalized model of plain layers, for steps of as many tokens as `sums` takes."""

    def __init__(self, model: DecoderLM, kernels: TritonLayers, sums: SumNorm) -> None:
        self._kernels = kernels
        self._sums = sums
        norms = [*(layer.input_norm for layer in model.layers), model.norm]
        self._first_norm = norms[0]
        self._layers = [
            _Layer(layer, linear_kernel(layer.mlp.gate_up_proj), norm)
            for layer, norm in zip(model.layers, norms[1:], strict=True)
        ]

    def takes(self, batch: AttentionBatch) -> bool:
        """Those that fit."""
        return len(batch.slot_mapping) <= self._sums.max_rows

    def __call__(self, hidden: torch.Tensor, batch: AttentionBatch, plan: Plan) -> torch.Tensor:
        """See FusedLayers; `hidden` is overwritten, and what comes back is good until the next step."""
        kernels, residual = self._kernels, hidden
        normed: torch.Tensor = self._first_norm(hidden)[0]
        for index, (layer, gate_up, next_norm) in enumerate(self._layers):
            attention = layer.attention
            heads = attention.num_heads, attention.num_kv_heads, attention.qk_norm
            attended = kernels.attend(attention.qkv_proj(normed), *heads, index, batch, plan)
            normed = self._sum(attention.o_proj, attended, residual, layer.mlp_norm)
            normed = self._sum(layer.mlp.down_proj, gate_up.gated(normed), residual, next_norm)
        return normed

    def _sum(self, linear: RowParallelLinear, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        part = linear.project(x, None, self._sums.buffer(len(x)))
        return self._sums(part, residual, norm.weight, norm.eps)
