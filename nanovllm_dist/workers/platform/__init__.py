"""Devices by name: the one place that knows which exist. Importing it does not import torch."""

from __future__ import annotations

from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform.base import Finding, Platform
from nanovllm_dist.workers.platform.cpu import CpuPlatform
from nanovllm_dist.workers.platform.cuda import CudaPlatform
from nanovllm_dist.workers.platform.npu import NpuPlatform

_PLATFORMS: tuple[type[Platform], ...] = (NpuPlatform, CudaPlatform, CpuPlatform)


def platform_names() -> list[str]:
    """Names that `--device` takes, besides `auto`."""
    return [platform.name for platform in _PLATFORMS]


def get_platform(name: str) -> Platform:
    """The platform of that name; `auto` gives the first whose device is present. Raises ConfigError."""
    for platform in _PLATFORMS:
        if name == platform.name or (name == "auto" and platform.is_present()):
            return platform()
    raise ConfigError(f"device={name!r} is not one of auto, {', '.join(platform_names())}")


def findings() -> dict[str, list[Finding]]:
    """What this host has of every kind of device, by its platform's name."""
    return {platform.name: platform().findings() for platform in _PLATFORMS}
