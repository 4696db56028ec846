"""The operations of a decoder layer on the CPU in bfloat16, by C kernels: one call each where torch takes up to ten.

A decode of one row is hundreds of small operations, and what torch adds to each is most of the step: a 135M model on
two cores took 27 ms that way, of which reading the weights is 6. The kernels round where torch's operators round.
float32 stays with torch, the reference.
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
from nanovllm_dist.workers.platform.cpu_kernels import kernel_library

# Rows from which oneDNN is faster where the processor has matrix tiles, which the C kernel does not use
_TILED_ROWS = 16
OUTPUTS_UNIT = 32
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "panel_linear": [_POINTER] * 4 + [_INT] * 3,
    "holds_panels": [_POINTER] * 2 + [_INT] * 2,
    "has_products": [],
    "add_rms_norm": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT],
    "rotate_and_store": [_POINTER] * 7 + [_INT] * 4 + [_FLOAT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 2,
}


class CpuLayers(TorchLayers):
    """LayerKernels of a bfloat16 model over `attention`, whose own kernel must be in use."""

    def __init__(self, attention: CpuAttention, library: ctypes.CDLL) -> None:
        super().__init__(attention)
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
        """See LayerKernels. The C kernel reads the weight as oneDNN packs it, where that is the known layout."""
        packed = pack_weight(weight, bias)
        if packed is None or not self._reads(packed, weight):
            return packed
        outputs, inputs = weight.shape
        return PanelLinear(self._linear, packed, bias, outputs, inputs, self._arena)

    def _reads(self, packed: Packed, weight: torch.Tensor) -> bool:
        outputs, inputs = weight.shape
        if (
            not self._has_products()
            or outputs % OUTPUTS_UNIT
            or inputs % 2
            or packed.num_bytes() != _panel_bytes(outputs, inputs)
        ):
            return False
        plain = weight.detach().contiguous()
        return bool(self._holds_panels(packed.pointer(), plain.data_ptr(), inputs, outputs))


class PanelLinear:
    """A LinearKernel by C over a copy of `packed` in `arena`.

    Where the processor has matrix tiles it reads `packed` itself, and leaves many rows to it.

    Two threads of a Zen 4 processor at the shapes of a 135M model, against oneDNN: 1.3 to 1.7 times as fast at 1 row,
    1.2 to 1.4 at 16 to 64, equal from 256 on.

    Attributes:
        weight, bias: where they lie; `bias` is None where there is none.
    """

    def __init__(
        self, function: Any, packed: Packed, bias: torch.Tensor | None, outputs: int, inputs: int, arena: Arena
    ) -> None:
        self._function = function
        self._outputs, self._inputs = outputs, inputs
        self._bias = bias  # kept alive
        self._packed = packed if torch.cpu._is_amx_tile_supported() else None
        self._arena = arena
        self.weight = packed.pointer() if self._packed else arena.place(packed.pointer(), packed.num_bytes())
        self.bias = None if bias is None else bias.data_ptr()

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See LinearKernel."""
        rows = len(x)
        if self._packed is not None and rows >= _TILED_ROWS:
            return self._packed(x, out)
        x = x.contiguous()
        output = x.new_empty(rows, self._outputs) if out is None else out
        self._function(x.data_ptr(), self.weight, self.bias, output.data_ptr(), rows, self._inputs, self._outputs)
        return output


def cpu_layers(attention: CpuAttention, dtype: torch.dtype) -> TorchLayers:
    """The C kernels for bfloat16 where they can be built, else torch's operators."""
    library = kernel_library() if dtype == torch.bfloat16 and attention.decodes_natively else None
    return TorchLayers(attention) if library is None else CpuLayers(attention, library)


def _panel_bytes(outputs: int, inputs: int) -> int:
    """Size of panels of 64 outputs and a multiple of 32 inputs."""
    return 2 * -(-outputs // 64) * 64 * -(-inputs // 32) * 32


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, name)
    function.argtypes = _ARGUMENTS[name]
    function.restype = _INT if name in ("holds_panels", "has_products") else None
    return function
