"""The operations of a decoder layer as Ascend operators, eagerly or inside a graph.

The cache of a layer is rows of head_dim in the order of [blocks, kv heads, block size]: what attention reads fastest,
and flat because a graph writes only to its inputs themselves in place, not to views of them. Decode rows are one call
without transposes; prefill rows are one packed call where the operator takes packed rows of this head size, and one
call each elsewhere. Which steps become graphs is unknown here; a graph that must change lengths later replaces
`decode_attention` while it is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.linear_kernel import LinearKernel
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.models.layers.rotary import RotaryEmbedding
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.models.partition import split_heads
from nanovllm_dist.workers.platform.npu_limits import MASK_SIZE, PACKED_HEAD_DIMS, SPARSE_CAUSAL
from nanovllm_dist.workers.platform.npu_weights import takes_nz, to_nz

# Keyword arguments of npu_fused_infer_attention_score -> its attention output
AttentionCall = Callable[[dict[str, Any]], torch.Tensor]


class _Plan(NamedTuple):
    """`places` [T * kv heads, 1] int64: rows of the flat cache; `cos`, `sin` [T, 1, 1, head_dim]."""

    places: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def attend_now(arguments: dict[str, Any]) -> torch.Tensor:
    """Queue the attention, or trace it."""
    output: torch.Tensor = torch.ops.npu.npu_fused_infer_attention_score(**arguments)[0]
    return output


class NpuLayers:
    """LayerKernels of one rank. `device`: the current NPU if None.

    Attributes:
        decode_attention: how the attention of decode rows is run.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        comm: Communicator,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        device = device or current_device()
        heads = split_heads(model.num_heads, model.num_kv_heads, comm.world_size, comm.rank)
        self.decode_attention: AttentionCall = attend_now
        self._block_size = config.block_size
        self._packs = model.head_dim in PACKED_HEAD_DIMS
        self._cos, self._sin = _rotation_tables(model, config.max_model_len, dtype, device)
        self._head_offsets = torch.arange(heads.num_kv_heads, device=device) * config.block_size
        mask = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu_(1).to(device)
        self._causal: dict[str, Any] = {"atten_mask": mask, "sparse_mode": SPARSE_CAUSAL}
        self._nz = config.weight_format == "nz"
        self._shared: dict[str, Any] = {
            "num_heads": heads.num_heads,
            "num_key_value_heads": heads.num_kv_heads,
            "scale": model.head_dim**-0.5,
            "block_size": config.block_size,
        }

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensors of its own, for a graph to know as inputs of one shape."""
        return [self._cos, self._sin, self._head_offsets]

    @contextmanager
    def attending_with(self, call: AttentionCall) -> Iterator[None]:
        """Decode rows attend through `call` meanwhile."""
        before, self.decode_attention = self.decode_attention, call
        try:
            yield
        finally:
            self.decode_attention = before

    def prepare(self, batch: AttentionBatch, positions: torch.Tensor, rotary: RotaryEmbedding) -> _Plan:
        """Where keys go, and each token's rotation. `rotary` is not read: its tables are here in the model's dtype."""
        # the cache is rows of heads, and a block holds those of one head after those of the one before
        slots = batch.slot_mapping.unsqueeze(1) + self._head_offsets
        shape = (len(positions), 1, 1, self._cos.shape[1])
        cos, sin = (table.index_select(0, positions).view(shape) for table in (self._cos, self._sin))
        return _Plan(slots.view(-1, 1), cos, sin)

    def attend(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: QueryKeyNorm | None,
        layer: int,
        batch: AttentionBatch,
        plan: _Plan,
    ) -> torch.Tensor:
        """See LayerKernels."""
        keys, values = batch.kv_caches[layer]
        dim = keys.shape[-1]
        query, key, value = qkv.split([num_heads * dim, num_kv_heads * dim, num_kv_heads * dim], dim=-1)
        query, key = query.unflatten(-1, (num_heads, dim)), key.unflatten(-1, (num_kv_heads, dim))
        if qk_norm is not None:
            query = torch.ops.npu.npu_rms_norm(query, qk_norm.query_weight, qk_norm.eps)[0]
            key = torch.ops.npu.npu_rms_norm(key, qk_norm.key_weight, qk_norm.eps)[0]
        query = torch.ops.npu.npu_rotary_mul(query.unsqueeze(1), plan.cos, plan.sin).squeeze(1)
        key = torch.ops.npu.npu_rotary_mul(key.unsqueeze(1), plan.cos, plan.sin)
        for cache, new in ((keys, key), (values, value)):
            torch.ops.npu.npu_scatter_nd_update_(cache, plan.places, new.reshape(-1, dim))
        return self._attend(query, keys, values, batch).flatten(1)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerKernels."""
        if residual is None:
            return torch.ops.npu.npu_rms_norm(x, weight, eps)[0], x
        normed, _rstd, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See LayerKernels."""
        output: torch.Tensor = torch.ops.npu.npu_swiglu(gate_up)
        return output

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """The weight in the format of the weight_format option; a graph gets one operator for it instead of two."""
        if self._nz and takes_nz(weight):
            weight = to_nz(weight)

        def kernel(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            if out is not None and bias is None and not torch.compiler.is_compiling():
                return torch.mm(x, weight.t(), out=out)
            linear = torch.ops.npu.npu_linear if torch.compiler.is_compiling() else F.linear
            output: torch.Tensor = linear(x, weight, bias)
            return output if out is None else out.copy_(output)

        return kernel

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """query [T, heads, head_dim], caches as they are -> [T, heads, head_dim]."""
        shape = (-1, self._shared["num_key_value_heads"], self._block_size, keys.shape[-1])
        caches = {"key": keys.view(shape), "value": values.view(shape)}
        decodes, rows = batch.num_decodes, len(batch.context_lens)
        if decodes == rows:
            return self._decode(query, caches, batch)
        if self._packs:
            return self._prefill_packed(query, caches, batch)
        parts = [self._decode(query[:decodes], caches, batch)] if decodes else []
        start = decodes
        for row in range(decodes, rows):
            end = start + batch.host_query_lens[row]
            parts.append(self._prefill(query[start:end], caches, batch, row))
            start = end
        return torch.cat(parts)

    def _decode(self, query: torch.Tensor, caches: dict[str, torch.Tensor], batch: AttentionBatch) -> torch.Tensor:
        """One token of each of the first rows."""
        rows = len(query)
        arguments = {
            "query": query.unsqueeze(2),
            "block_table": batch.block_tables[:rows],
            "actual_seq_lengths_kv": batch.host_context_lens[:rows],
            "input_layout": "BNSD",
        }
        return self.decode_attention({**arguments, **caches, **self._shared}).squeeze(2)

    def _prefill_packed(
        self, query: torch.Tensor, caches: dict[str, torch.Tensor], batch: AttentionBatch
    ) -> torch.Tensor:
        """All rows of a step, decodes too, one behind the other."""
        arguments = {
            "query": query,
            "block_table": batch.block_tables,
            "actual_seq_lengths": list(accumulate(batch.host_query_lens)),
            "actual_seq_lengths_kv": batch.host_context_lens,
            "input_layout": "TND",
        }
        return attend_now({**arguments, **caches, **self._shared, **self._causal})

    def _prefill(
        self, query: torch.Tensor, caches: dict[str, torch.Tensor], batch: AttentionBatch, row: int
    ) -> torch.Tensor:
        """query [tokens, heads, head_dim] of one row."""
        arguments = {
            "query": query.transpose(0, 1).unsqueeze(0).contiguous(),
            "block_table": batch.block_tables[row : row + 1],
            "actual_seq_lengths": [len(query)],
            "actual_seq_lengths_kv": batch.host_context_lens[row : row + 1],
            "input_layout": "BNSD",
        }
        output = attend_now({**arguments, **caches, **self._shared, **self._causal})
        return output.squeeze(0).transpose(0, 1)


def current_device() -> torch.device:
    """The NPU of this process."""
    from torch_npu import npu

    return torch.device("npu", npu.current_device())


def _rotation_tables(
    model: ModelConfig, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosines, sines) [length, head_dim] as npu_rotary_mul takes them: it negates the half itself."""
    tables = RotaryEmbedding(model, torch.device("cpu"))
    sin = tables.sin_table[:length].clone()
    sin[:, : model.head_dim // 2].neg_()
    return tables.cos_table[:length].to(device, dtype), sin.to(device, dtype)
