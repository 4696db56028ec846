"""Linear layers with weights of int8 on the CPU: rounded at load, one scale for each output; activations stay bfloat16.

A decode of few rows waits for weights to be read, and these are half as many bytes as bfloat16. The C kernel multiplies
them as bfloat16, which holds -127 to 127 exactly, in sums of float32, and each sum by its scale. Where it does not run,
torch multiplies the same integers, which saves no memory and no time. At tp > 1 every rank rounds the part it holds: a
row-parallel layer then has other scales than at tp 1, so tokens may differ between degrees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm_dist.errors import WeightsError
from nanovllm_dist.models.layers.kernels import TorchLayers
from nanovllm_dist.models.layers.linear_kernel import LinearKernel, pack_linear

LARGEST = 127
_PANEL = 64
_CHUNK_ELEMENTS = 2**18  # rounded at a time, so that what lies between stays in the caches


class RoundingTorchLayers(TorchLayers):
    """TorchLayers over rounded weights."""

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel | None:
        """See LayerKernels. Raises WeightsError as `round_weight` does."""
        return RoundedLinear(*round_weight(weight), bias) if weight.numel() else None


class RoundedLinear:
    """A LinearKernel by torch over int8 `values` [out, in], held as bfloat16, and float32 `scales` [out].

    Its inputs are bfloat16; the product is rounded once more than by the C kernel.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        integers = values.to(torch.bfloat16)
        self._packed = pack_linear(integers, None)
        self._integers = integers if self._packed is None else None
        self._scales = scales
        self._bias = bias

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See LinearKernel."""
        if self._packed is not None:
            product = self._packed(x)
        else:
            assert self._integers is not None
            product = F.linear(x, self._integers)
        output = product.float() * self._scales
        if self._bias is not None:
            output += self._bias
        return output.to(x.dtype) if out is None else out.copy_(output)


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> int8 [out, in] in -127..127 and float32 scales [out], weight ~ int8 * scale.

    A scale is the largest magnitude of its output divided by 127, or 1 if that is 0; values round to nearest even.
    Raises WeightsError where a weight is NaN or infinite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for part, rounded, scale in zip(weight.detach().split(rows), values.split(rows), scales.split(rows), strict=True):
        exact = part.float()
        largest = exact.abs().amax(dim=1)
        if not largest.isfinite().all():
            raise WeightsError(
                f"a weight of {list(weight.shape)} holds NaN or infinity, for which int8 has no value: use "
                "weight_format=plain, or a checkpoint without"
            )
        scale.copy_(largest / LARGEST).masked_fill_(largest == 0, 1.0)
        rounded.copy_(exact.div_(scale.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST))
    return values, scales


def to_panels(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, in], in even -> panels as cpu_products.c reads them: [out / 64, in / 2, 64, 2], with `out` rounded up
    to 64, `in` to 32, and zeros there."""
    outputs, inputs = values.shape
    padded = F.pad(values, (0, -inputs % 32, 0, -outputs % _PANEL))
    return padded.view(-1, _PANEL, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
