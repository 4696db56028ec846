"""Rotary position embedding: default, linear, llama3 and YaRN frequencies, as fp32 tables over positions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from nanovllm_dist.models.config import ModelConfig


class Rotation(NamedTuple):
    """Of the tokens of one step, fp32 [T, 1, head_dim]: cosines, and sines with the first half negated."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate heads x [T, heads, head_dim]: dimension i turns with dimension i + head_dim / 2. Computed in fp32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(rotation.sin).addcmul_(wide, rotation.cos).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Looks up the rotation of each position; one per model, used once per step for all layers."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        frequencies, scale = rope_frequencies(config)
        angles = torch.outer(torch.arange(_table_length(config), dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos_table = torch.cat((cos, cos), dim=-1).to(device)
        self.sin_table = torch.cat((-sin, sin), dim=-1).to(device)

    def forward(self, positions: torch.Tensor) -> Rotation:
        """positions [T] int64, below the model's maximum -> their Rotation."""
        cos = self.cos_table.index_select(0, positions).unsqueeze(1)
        return Rotation(cos, self.sin_table.index_select(0, positions).unsqueeze(1))


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(radians per position [head_dim / 2] in fp32, factor on cosines and sines) of the model's RoPE kind."""
    params = config.rope.params
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    periods: torch.Tensor = config.rope.theta**exponents
    if config.rope.kind == "linear":
        return 1.0 / periods / params["factor"], 1.0
    if config.rope.kind == "llama3":
        return _llama3(1.0 / periods, params), 1.0
    if config.rope.kind == "yarn":
        return _yarn(periods, config.head_dim, config.rope.theta, params), _yarn_scale(params)
    return 1.0 / periods, 1.0


def _table_length(config: ModelConfig) -> int:
    length = config.max_position_embeddings
    if config.rope.kind == "yarn":  # some checkpoints keep the unscaled length in max_position_embeddings
        params = config.rope.params
        length = max(length, math.ceil(params["factor"] * params["original_max_position_embeddings"]))
    return length


def _llama3(frequencies: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    trained_length = params["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = (trained_length / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    slowed = torch.where(wavelengths > trained_length / low, frequencies / factor, blended)
    return torch.where(wavelengths < trained_length / high, frequencies, slowed)


def _yarn(periods: torch.Tensor, head_dim: int, theta: float, params: dict[str, Any]) -> torch.Tensor:
    """Dimensions that turn often in the trained length keep their frequency, the others are interpolated."""
    trained_length = params["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(params.get("beta_fast") or 32)
    high = dimension_of(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies: torch.Tensor = 1.0 / (params["factor"] * periods) * ramp + 1.0 / periods * (1 - ramp)
    return frequencies


def _yarn_scale(params: dict[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(params["factor"]) + 1.0 if params["factor"] > 1 else 1.0

    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)
