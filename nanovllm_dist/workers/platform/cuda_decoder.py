"""The layers of one rank with two launches less in each: norms without kernels of their own.

RMSNorm divides a row by its root mean square and multiplies each feature by a weight. The weight goes into the matrix
that follows, once, after loading. The division commutes with the product, so the kernel after the product makes up for
it: the rotation, and the activation. And a product can add itself to the residual where it is written. What is left of
a layer is four products, the rotation, attention and the activation.

What this rounds differs from the norm's own kernel: the weights times the norm's once, but not the normed row. Rows
are multiplied at their full size, which may be too much for float16. Several ranks sum before they add: see
`cuda_sharded_decoder`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm_dist.models.layers.attention import Attention
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLayer, DecoderLM
from nanovllm_dist.models.layers.linear import PackedLinear
from nanovllm_dist.models.layers.mlp import MLP
from nanovllm_dist.models.layers.norm import RMSNorm
from nanovllm_dist.workers.platform.cuda_layers import Plan, TritonLayers
from nanovllm_dist.workers.platform.cuda_linear import CudaLinear


class _Layer(NamedTuple):
    attention: Attention
    qkv: CudaLinear
    o: CudaLinear
    gate_up: CudaLinear
    down: CudaLinear


class DeferredNorms:
    """FusedLayers of a loaded and finalized model for which `can_defer_norms`. Its weights are changed for this: the
    norms' are ones afterwards, so that its own layers still compute the same."""

    def __init__(self, model: DecoderLM, kernels: TritonLayers) -> None:
        self._kernels = kernels
        self._norm = model.norm
        self._layers = [_fold(layer) for layer in model.layers]

    def takes(self, batch: AttentionBatch) -> bool:
        """Any step."""
        return True

    def __call__(self, hidden: torch.Tensor, batch: AttentionBatch, plan: Plan) -> torch.Tensor:
        """See FusedLayers; `hidden` is overwritten."""
        kernels, eps = self._kernels, self._norm.eps
        for index, (attention, qkv, o, gate_up, down) in enumerate(self._layers):
            heads = attention.num_heads, attention.num_kv_heads, attention.qk_norm
            product = qkv.product(hidden)
            o.add_to(hidden, kernels.attend(product, *heads, index, batch, plan, qkv.bias, hidden, eps))
            down.add_to(hidden, gate_up.gated(hidden, eps))
        normed: torch.Tensor = self._norm(hidden)[0]
        return normed


def can_defer_norms(model: DecoderLM, world_size: int) -> bool:
    """Whether `DeferredNorms` computes what the layers of this model do."""
    return world_size == 1 and model.norm.weight.dtype != torch.float16 and is_plain(model)


def is_plain(model: DecoderLM) -> bool:
    """Whether its layers are the usual ones, without bias but for queries, keys and values."""
    return all(map(_is_plain, model.layers))


def _is_plain(layer: DecoderLayer) -> bool:
    if type(layer) is not DecoderLayer or type(layer.mlp) is not MLP:
        return False
    return all(one.bias is None for one in (layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj))


def _fold(layer: DecoderLayer) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    _move_weight(layer.input_norm, linear_kernel(attention.qkv_proj))
    _move_weight(layer.mlp_norm, linear_kernel(mlp.gate_up_proj))
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return _Layer(attention, *map(linear_kernel, linears))


def _move_weight(norm: RMSNorm, linear: CudaLinear) -> None:
    linear.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


def linear_kernel(linear: PackedLinear) -> CudaLinear:
    """What `TritonLayers.pack_linear` made of it."""
    assert isinstance(linear.kernel, CudaLinear)
    return linear.kernel
