"""Weights of linear layers in NZ, the tiled format that the matrix unit of an NPU reads without rearranging.

The values stay the same and only their order in memory changes. Whether it pays is not measured, for that takes a card,
so it is an option.
"""

from __future__ import annotations

import torch

_FRACTAL_NZ = 29
_TILE = 16


def takes_nz(weight: torch.Tensor) -> bool:
    """Whether a weight [out, in] can be in NZ without padding."""
    return weight.dtype in (torch.float16, torch.bfloat16) and all(size % _TILE == 0 for size in weight.shape)


def to_nz(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [out, in] in NZ; the weight must be one that `takes_nz`."""
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    tiled: torch.Tensor = torch_npu.npu_format_cast(weight.detach(), _FRACTAL_NZ)
    return tiled
