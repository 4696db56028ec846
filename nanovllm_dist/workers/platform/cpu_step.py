"""All layers of a decoder as one C call, in bfloat16, on one rank or on several of one host.

Between two products of a decode of one row Python and torch take as long as the product itself: SmolLM2-135M on two
cores decodes 65 tokens/s with a call for each operation. Few decodes run in a way of their own (cpu_step.c), all other
steps in cpu_batch.c. It knows the plain decoder layer and no other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.decoder import DecoderLayer, DecoderLM
from nanovllm_dist.models.layers.kernels import TorchPlan
from nanovllm_dist.models.layers.linear import PackedLinear
from nanovllm_dist.models.layers.mlp import MLP
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.platform.cpu_group import PART_BYTES, CpuGroup
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library
from nanovllm_dist.workers.platform.cpu_layers import OUTPUTS_UNIT, Matrix, PanelLinear

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
# Rows of a step of few decodes: with more, threads that each compute all norms waste what they save in waiting
FEW_ROWS = 8


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _POINTER) for name in ("input_norm", "qkv_bias", "qk_norm", "mlp_norm", "gate_up_bias")),
        *((name, _POINTER) for name in ("keys", "values")),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "intermediate", "block_size")),
        *((name, _FLOAT) for name in ("eps", "qk_eps")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("input", "cos", "sin", "slots", "tables", "lengths", "output")),
        ("table_stride", ctypes.c_int64),
        ("rows", _INT),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("input", "cos", "sin", "slots", "tables", "lengths", "starts")),
        *((name, _POINTER) for name in ("output", "space")),
        ("table_stride", ctypes.c_int64),
        *((name, _INT) for name in ("tokens", "rows", "decodes")),
    ]


class CpuStep:
    """The decoder's layers and final norm; see `FusedLayers`. The weights must stay where they are."""

    def __init__(self, model: DecoderLM, library: ctypes.CDLL, group: CpuGroup | None = None) -> None:
        """`group`: the ranks that hold the other shards, None if there are none."""
        self._run_few, self._run, self._space_of = library.decode_step, library.batch_step, library.batch_space
        for run in (self._run_few, self._run):
            run.argtypes, run.restype = [_POINTER] * 5, None
        self._space_of.argtypes, self._space_of.restype = [_POINTER, ctypes.c_int64], ctypes.c_int64
        self._space = torch.empty(0, dtype=torch.bfloat16)
        self._group = group
        self._final = model.norm.weight
        self._layers = (_Layer * model.num_layers)(*map(_pointers, model.layers))
        first = model.layers[0]
        qk_norm = first.attention.qk_norm
        self._shape = _Shape(
            layers=model.num_layers,
            hidden=len(self._final),
            heads=first.attention.num_heads,
            kv_heads=first.attention.num_kv_heads,
            dim=model.head_dim,
            intermediate=first.mlp.gate_up_proj.out_features // 2,
            eps=model.norm.eps,
            qk_eps=0.0 if qk_norm is None else qk_norm.eps,
        )
        self._caches: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def few_rows(self) -> int:
        """Decodes up to which there is a way of their own: several ranks must tell each other all of it at once."""
        return min(FEW_ROWS, PART_BYTES // (2 * len(self._final)))

    def pointers(self, caches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int, int]:
        """Where the library finds the layers over these caches, their shape and the weight of the last norm."""
        self._use(caches)
        return ctypes.addressof(self._layers), ctypes.addressof(self._shape), self._final.data_ptr()

    def takes(self, batch: AttentionBatch) -> bool:
        """Whether there is anything to run: any rows do."""
        return bool(batch.host_query_lens)

    def __call__(self, hidden: torch.Tensor, batch: AttentionBatch, plan: TorchPlan) -> torch.Tensor:
        """Embeddings [T, hidden] -> hidden states [T, hidden] after the final norm."""
        if batch.kv_caches is not self._caches:
            self._use(batch.kv_caches)
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        rows = len(batch.host_query_lens)
        few = batch.num_decodes == rows <= self.few_rows
        run, step = (self._run_few, self._few) if few else (self._run, self._batch)
        now = step(hidden, output, batch, plan)
        arguments = (self._layers, ctypes.byref(self._shape), self._final.data_ptr(), ctypes.byref(now))
        if self._group is None:
            run(*arguments, None)
        else:
            self._group.check()
            run(*arguments, self._group.pointer)
            self._group.check()
        return output

    def _few(self, hidden: torch.Tensor, output: torch.Tensor, batch: AttentionBatch, plan: TorchPlan) -> _Step:
        return _Step(
            hidden.data_ptr(),
            plan.rotation.cos.data_ptr(),
            plan.rotation.sin.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.context_lens.data_ptr(),
            output.data_ptr(),
            batch.block_tables.stride(0),
            len(hidden),
        )

    def _batch(self, hidden: torch.Tensor, output: torch.Tensor, batch: AttentionBatch, plan: TorchPlan) -> _Batch:
        size = self._space_of(ctypes.byref(self._shape), len(hidden))
        if len(self._space) < size:
            self._space = torch.empty(size, dtype=torch.bfloat16)
        return _Batch(
            hidden.data_ptr(),
            plan.rotation.cos.data_ptr(),
            plan.rotation.sin.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.query_start.data_ptr(),
            output.data_ptr(),
            self._space.data_ptr(),
            batch.block_tables.stride(0),
            len(hidden),
            len(batch.host_query_lens),
            batch.num_decodes,
        )

    def _use(self, caches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._shape.block_size = caches[0][0].shape[1]
        self._caches = caches


def fuse_step(model: DecoderLM, comm: Communicator, dtype: torch.dtype) -> CpuStep | None:
    """The fused layers of a loaded and finalized model, or None where a layer or its weights are of another kind."""
    group = comm if isinstance(comm, CpuGroup) else None
    library = kernel_library() if dtype == torch.bfloat16 and (group or comm.world_size == 1) else None
    if library is None or not _is_plain(model.layers):
        return None
    return CpuStep(model, library, group)


def _is_plain(layers: Sequence[DecoderLayer]) -> bool:
    for layer in layers:
        if type(layer) is not DecoderLayer or type(layer.mlp) is not MLP:
            return False
        row_parallel = (layer.attention.o_proj, layer.mlp.down_proj)
        linears = (layer.attention.qkv_proj, layer.mlp.gate_up_proj, *row_parallel)
        if not all(isinstance(linear.kernel, PanelLinear) for linear in linears):
            return False
        if any(linear.bias is not None for linear in row_parallel) or layer.mlp.gate_up_proj.out_features % (
            2 * OUTPUTS_UNIT
        ):
            return False
    return True


def _pointers(layer: DecoderLayer) -> _Layer:
    attention, mlp = layer.attention, layer.mlp
    return _Layer(
        input_norm=layer.input_norm.weight.data_ptr(),
        qkv=_panels(attention.qkv_proj).matrix,
        qkv_bias=_panels(attention.qkv_proj).bias,
        qk_norm=None if attention.qk_norm is None else attention.qk_norm.weight.data_ptr(),
        o=_panels(attention.o_proj).matrix,
        mlp_norm=layer.mlp_norm.weight.data_ptr(),
        gate_up=_panels(mlp.gate_up_proj).matrix,
        gate_up_bias=_panels(mlp.gate_up_proj).bias,
        down=_panels(mlp.down_proj).matrix,
    )


def _panels(linear: PackedLinear) -> PanelLinear:
    assert isinstance(linear.kernel, PanelLinear)
    return linear.kernel
