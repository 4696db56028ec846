"""The gated activation of the MLP, from torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * size], gates first -> silu(gates) * rest, [T, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
