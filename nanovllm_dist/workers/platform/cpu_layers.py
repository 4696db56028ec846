"""The operations of a decoder layer on the CPU in bfloat16, by C kernels: one call each where torch takes up to ten.

A decode of one row is hundreds of small operations, and what torch adds to each is most of the step: a 135M model on
two cores took 27 ms that way, of which reading the weights is 6. The kernels round where torch's operators round.
float32 stays with torch, the reference. Weights are bfloat16 too, or int8 (see cpu_int8.py).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from nanovllm_dist.models.layers.attention_batch import AttentionBatch
from nanovllm_dist.models.layers.kernels import TorchLayers, TorchPlan
from nanovllm_dist.models.layers.linear_kernel import LinearKernel, Packed, pack_weight
from nanovllm_dist.models.layers.norm import QueryKeyNorm
from nanovllm_dist.workers.platform.cpu_arena import Arena
from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
from nanovllm_dist.workers.platform.cpu_int8 import RoundedLinear, RoundingTorchLayers, round_weight, to_panels
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library

# Rows from which oneDNN is faster where the processor has matrix tiles, which the C kernel does not use
_TILED_ROWS = 16
OUTPUTS_UNIT = 32
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "panel_linear": [_POINTER] * 5 + [_INT] * 3,
    "holds_panels": [_POINTER] * 2 + [_INT] * 2,
    "has_products": [],
    "add_rms_norm": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT],
    "rotate_and_store": [_POINTER] * 7 + [_INT] * 4 + [_FLOAT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 2,
}


class CpuLayers(TorchLayers):
    """LayerKernels of a bfloat16 model over `attention`, whose own kernel must be in use; `int8`: of weights."""

    def __init__(self, attention: CpuAttention, library: ctypes.CDLL, int8: bool) -> None:
        super().__init__(attention)
        self._int8 = int8
        self._cpu_attention = attention
        self._arena = Arena()
        self._linear, self._holds_panels, self._has_products, self._norm, self._rotate, self._silu = (
            _function(library, name) for name in _ARGUMENTS
        )

    def attend(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: QueryKeyNorm | None,
        layer: int,
        batch: AttentionBatch,
        plan: TorchPlan,
    ) -> torch.Tensor:
        """See LayerKernels; `qkv` is overwritten."""
        keys, values = batch.kv_caches[layer]
        tokens, dim = len(qkv), keys.shape[-1]
        self._rotate(
            qkv.data_ptr(),
            None if qk_norm is None else qk_norm.weight.data_ptr(),
            plan.rotation.cos.data_ptr(),
            plan.rotation.sin.data_ptr(),
            batch.slot_mapping.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tokens,
            num_heads,
            num_kv_heads,
            dim,
            0.0 if qk_norm is None else qk_norm.eps,
        )
        heads = qkv.view(tokens, -1, dim)
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return self._cpu_attention.attend_stored(query, key, value, layer, batch, plan.attention).view(tokens, -1)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See LayerKernels."""
        x = x.contiguous()
        output = torch.empty_like(x)
        rows, size = x.shape
        if residual is None:
            self._norm(x.data_ptr(), None, weight.data_ptr(), None, output.data_ptr(), rows, size, eps)
            return output, x
        added = residual.data_ptr()
        self._norm(x.data_ptr(), added, weight.data_ptr(), added, output.data_ptr(), rows, size, eps)
        return output, residual

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See LayerKernels."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        output = gate_up.new_empty(rows, size)
        self._silu(gate_up.data_ptr(), output.data_ptr(), rows, size)
        return output

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """See LayerKernels. The C kernel reads the weight as oneDNN packs it, where that is the known layout. Raises
        WeightsError where weights are to be int8 and cannot."""
        if self._int8 and weight.numel():
            return self._pack_int8(weight, bias)
        packed = pack_weight(weight, bias)
        if packed is None or not self._reads(packed, weight):
            return packed
        tiled = packed if torch.cpu._is_amx_tile_supported() else None
        place = packed.pointer() if tiled else self._arena.place(packed.pointer(), packed.num_bytes())
        return PanelLinear(self._linear, self._arena, place, None, bias, weight.shape, tiled)

    def _pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel:
        values, scales = round_weight(weight)
        if not self._takes(weight):
            return RoundedLinear(values, scales, bias)
        panels = to_panels(values)
        place = self._arena.place(panels.data_ptr(), panels.nbytes)
        return PanelLinear(self._linear, self._arena, place, scales, bias, weight.shape)

    def _takes(self, weight: torch.Tensor) -> bool:
        outputs, inputs = weight.shape
        return bool(self._has_products()) and outputs % OUTPUTS_UNIT == 0 and inputs % 2 == 0

    def _reads(self, packed: Packed, weight: torch.Tensor) -> bool:
        outputs, inputs = weight.shape
        if not self._takes(weight) or packed.num_bytes() != _panel_bytes(outputs, inputs):
            return False
        plain = weight.detach().contiguous()
        return bool(self._holds_panels(packed.pointer(), plain.data_ptr(), inputs, outputs))


class Matrix(ctypes.Structure):
    """A weight as the library's `matrix`: addresses of its panels and of the scales of int8, None where it is not."""

    _fields_ = [("panels", _POINTER), ("scales", _POINTER)]


class PanelLinear:
    """A LinearKernel by C over panels of a weight of `shape` [out, in] at the address `weight`, in `arena` or `tiled`.

    Where the processor has matrix tiles it reads oneDNN's `tiled` weight itself, and leaves many rows to it; of int8
    there is none, so many rows are slower there than in bfloat16.

    Two threads of a Zen 4 processor at the shapes of a 135M model, against oneDNN: 1.3 to 1.7 times as fast at 1 row,
    1.2 to 1.4 at 16 to 64, equal from 256 on.

    Attributes:
        matrix: the weight, for other kernels of the library.
        bias: its address, None where there is none.
    """

    def __init__(
        self,
        function: Any,
        arena: Arena,
        weight: int,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        shape: tuple[int, ...],
        tiled: Packed | None = None,
    ) -> None:
        self._function = function
        self._outputs, self._inputs = shape
        self._tiled = tiled
        self._kept = (arena, scales, bias)  # what the addresses are of
        self.matrix = Matrix(weight, None if scales is None else scales.data_ptr())
        self.bias = None if bias is None else bias.data_ptr()

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See LinearKernel."""
        rows = len(x)
        if self._tiled is not None and rows >= _TILED_ROWS:
            return self._tiled(x, out)
        x = x.contiguous()
        output = x.new_empty(rows, self._outputs) if out is None else out
        weight = (self.matrix.panels, self.matrix.scales, self.bias)
        self._function(x.data_ptr(), *weight, output.data_ptr(), rows, self._inputs, self._outputs)
        return output


def cpu_layers(attention: CpuAttention, dtype: torch.dtype, int8: bool = False) -> TorchLayers:
    """The C kernels for bfloat16 where they can be built, else torch's operators; over weights of int8 if asked."""
    library = kernel_library() if dtype == torch.bfloat16 and attention.decodes_natively else None
    if library is None:
        return RoundingTorchLayers(attention) if int8 else TorchLayers(attention)
    return CpuLayers(attention, library, int8)


def _panel_bytes(outputs: int, inputs: int) -> int:
    """Size of panels of 64 outputs and a multiple of 32 inputs."""
    return 2 * -(-outputs // 64) * 64 * -(-inputs // 32) * 32


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = _ARGUMENTS[name]
    function.restype = _INT if name in ("holds_panels", "has_products") else None
    return function
