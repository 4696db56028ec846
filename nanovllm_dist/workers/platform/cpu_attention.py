"""Attention on the CPU: decode rows by a C kernel that reads the paged cache in place, prefill rows by torch.

A whole decode step of a 135M model in bf16, 64 rows on two cores: 107 ms, where gathering blocks for torch's fused
attention took 131. Without a compiler, or for other head sizes, everything is torch's.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.torch_attention import TorchAttention
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library

HEAD_DIMS = (64, 80, 96, 128)
_NAMES = {torch.bfloat16: "bf16", torch.float32: "float"}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = [
    *(_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _POINTER),
    *(_INT, _INT, _INT, _INT, ctypes.c_float, _INT),
]


class CpuAttention(TorchAttention):
    """An AttentionBackend for one model's head size and dtype."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._kernel: Any = None
        library = kernel_library() if head_dim in HEAD_DIMS and dtype in _NAMES else None
        if library is not None:
            self._kernel = getattr(library, f"decode_{_NAMES[dtype]}_{head_dim}")
            self._kernel.argtypes, self._kernel.restype = _ARGUMENTS, None

    @property
    def decodes_natively(self) -> bool:
        """Whether the C kernel is in use."""
        return self._kernel is not None

    def plans_decodes(self) -> bool:
        """The kernel needs no buckets, gather indices or masks."""
        return self._kernel is None

    def attend_stored(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        plan: Any,
    ) -> torch.Tensor:
        """See TorchAttention."""
        output = super().attend_stored(query, key, value, layer, batch, plan)
        if self._kernel is not None and batch.num_decodes:
            self._decode_rows(query, output, batch, *batch.kv_caches[layer])
        return output

    def _decode_rows(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        batch: AttentionBatch,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        heads, dim = query.shape[1:]
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        rows, block_size, kv_heads = batch.num_decodes, keys.shape[1], keys.shape[2]
        self._kernel(
            query.data_ptr(),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            batch.context_lens.data_ptr(),
            output.data_ptr(),
            rows,
            kv_heads,
            heads // kv_heads,
            block_size,
            dim**-0.5,
            # whole rows read memory in order; a few rows are cut so that every thread has one
            min(kv_heads, -(-2 * torch.get_num_threads() // rows)),
        )
