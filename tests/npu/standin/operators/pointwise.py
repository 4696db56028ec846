"""Norms, rotation, gated activation and format cast, as torch_npu's operators define them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`x * rstd * gamma` over the dimensions of gamma, and rstd in fp32 with those dimensions as 1."""
    dims = tuple(range(-gamma.dim(), 0))
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of `x1 + x2`, rstd, and the sum itself, which the norm sees rounded to its dtype."""
    total = (x1.float() + x2.float()).to(x1.dtype)
    return (*rms_norm(total, gamma, epsilon), total)


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """`x * r1 + turned(x) * r2`; "half" turns (a, b) into (-b, a), "interleave" does so in each pair of neighbours."""
    if rotate is not None:
        raise NotImplementedError("npu_rotary_mul with a matrix to rotate by is not emulated")
    wide = x.float()
    if rotary_mode == "half":
        low, high = wide.chunk(2, -1)
        turned = torch.cat((-high, low), -1)
    elif rotary_mode == "interleave":
        turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), -1).flatten(-2)
    else:
        raise NotImplementedError(f"npu_rotary_mul with rotary_mode={rotary_mode!r} is not emulated")
    return (wide * r1.float() + turned * r2.float()).to(x.dtype)


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """silu of the first half of `dim`, times the second half."""
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`."""
    return torch.nn.functional.linear(x, weight, bias)


def format_cast(x: Tensor, acl_format: int, **ignored: object) -> Tensor:
    """The same values: how a card lays them out in memory is not emulated."""
    return x.clone()


KERNELS = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_linear": linear,
    "npu_format_cast": format_cast,
}
