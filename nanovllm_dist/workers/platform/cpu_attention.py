"""Attention on the CPU by C kernels that read the paged cache in place: decode rows, and in bfloat16 prefill rows too.

Without a compiler, or for other head sizes, everything is torch's; prefill rows in float32 are as well. Prefills of a
layer with 3 x 3 heads of 64 on two Zen 4 cores, against torch's fused attention row by row: 14 rows of 146 tokens
3.1 ms instead of 10, one of 2,000 22 instead of 43, ten of 100 after 300 4.6 instead of 10.6; with multiplication of
bfloat16 switched off 4.5, 34 and 7.3. Not measured on processors with shorter vectors.
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


class PrefillArguments(ctypes.Structure):
    """`attention` of cpu_prefill.c."""

    _fields_ = [
        *((name, _POINTER) for name in ("query", "keys", "values", "tables", "lengths", "starts", "output")),
        *((name, _LONG) for name in ("query_stride", "table_stride")),
        *((name, ctypes.c_int32) for name in ("kv_heads", "group", "dim", "block_size")),
    ]


class CpuAttention(TorchAttention):
    """An AttentionBackend for one model's head size and dtype."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._kernel: Any = None
        self._prefill: Any = None
        library = kernel_library() if head_dim in HEAD_DIMS and dtype in _NAMES else None
        if library is not None:
            self._kernel = getattr(library, f"decode_{_NAMES[dtype]}_{head_dim}")
            self._kernel.argtypes, self._kernel.restype = _ARGUMENTS, None
            if dtype == torch.bfloat16:
                self._prefill = library.prefill_bf16
                self._prefill.argtypes, self._prefill.restype = [_POINTER, _INT, _INT], None

    @property
    def decodes_natively(self) -> bool:
        """Whether the C kernel is in use."""
        return self._kernel is not None

    def plans_decodes(self) -> bool:
        """The kernel needs no buckets, gather indices or masks."""
        return self._kernel is None

    def plans_prefills(self) -> bool:
        """The kernel reads the block tables."""
        return self._prefill is None

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
        if self._prefill is not None and batch.num_decodes < len(batch.host_query_lens):
            self._prefill_rows(query, output, batch, *batch.kv_caches[layer])
        return output

    def _prefill_rows(
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
        arguments = PrefillArguments(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.query_start.data_ptr(),
            output.data_ptr(),
            query.stride(0),
            batch.block_tables.stride(0),
            keys.shape[2],
            heads // keys.shape[2],
            dim,
            keys.shape[1],
        )
        self._prefill(ctypes.byref(arguments), batch.num_decodes, len(batch.host_query_lens))

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
