"""What differs between devices, as one interface; everything else in the engine is the same code.

A platform knows its device and nothing of requests, plans or models. Modules here import torch only inside
methods, so that the launcher can read defaults without paying for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch._C._distributed_c10d import Store

    from nanovllm_dist.models.config import ModelConfig
    from nanovllm_dist.models.layers.decoder import DecoderLM, FusedLayers
    from nanovllm_dist.models.layers.embedding import LMHead
    from nanovllm_dist.models.layers.kernels import LayerKernels
    from nanovllm_dist.models.parallel import Communicator
    from nanovllm_dist.workers.graphs import Recorder
    from nanovllm_dist.workers.kv_cache import CacheLayout
    from nanovllm_dist.workers.transfers import Transfers


_LONGER_SECONDS = 60.0
_LONGEST_SECONDS = 7 * 86_400.0  # its milliseconds fit 32 bits


def patience(config: EngineConfig) -> timedelta:
    """How long a rank waits for others inside a step or between them, when they load at different speeds.

    Longer than the coordinator, which knows more and is to give up first.
    """
    seconds = max(config.startup_timeout, config.step_timeout or _LONGEST_SECONDS) + _LONGER_SECONDS
    return timedelta(seconds=min(seconds, _LONGEST_SECONDS))


class DeviceSampler(Protocol):
    """Argmax and plain temperature draws, without waiting for the device."""

    @property
    def uniform_dtype(self) -> type[np.floating[Any]]:
        """What it draws with."""
        ...

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """logits [N, columns] of this rank, float32 [N] inverse temperatures (0: greedy), `uniform_dtype` [N] uniforms
        in [0, 1) -> int64 [N], equal on all ranks. Every rank must call it."""
        ...

    def append(self, table: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Write tokens int64 [N] behind int64 [N] places of the flat token table, in a way that a graph of the device
        can hold; returns the tokens. Places that are there twice get one of their tokens."""
        ...


@dataclass(frozen=True)
class Finding:
    """One fact about this host. `remark` says what follows from it; with `blocks` the device cannot be used until that
    is mended, and the remark says how."""

    subject: str
    value: str
    remark: str = ""
    blocks: bool = False


class Platform(ABC):
    """One kind of device."""

    name: ClassVar[str]
    ray_resource: ClassVar[str]  # the Ray resource of which each rank reserves one unit
    visible_devices_env: ClassVar[str]  # the variable that limits a process to some devices; "" if there is none
    default_dtype: ClassVar[str]  # of a checkpoint whose config names none
    default_block_size: ClassVar[int]
    default_max_num_seqs: ClassVar[int]
    default_max_num_batched_tokens: ClassVar[int]
    default_steps_in_flight: ClassVar[int]
    cache_layout: ClassVar[CacheLayout] = "tokens"
    token_dtype: ClassVar[str] = "int32"  # of the token table
    weight_formats: ClassVar[tuple[str, ...]] = ("plain",)
    graph_modes: ClassVar[tuple[str, ...]] = ("auto", "eager")  # values of the graph_mode option

    @staticmethod
    @abstractmethod
    def is_present() -> bool:
        """Whether such a device is on this machine and torch can use it, found out without importing torch."""

    @staticmethod
    @abstractmethod
    def count_devices() -> int:
        """Devices that the driver shows this process, found out without importing torch."""

    @abstractmethod
    def findings(self) -> list[Finding]:
        """What this host has of the device, its driver and its software; nothing where there is no trace of them."""

    def check(self, config: EngineConfig, model: ModelConfig) -> None:
        """Whether the device can run this resolved config. Raises ConfigError naming the option to change."""
        if config.weight_format not in self.weight_formats:
            raise ConfigError(f"weight_format={config.weight_format!r} is not for device={self.name}: leave it out")
        if config.graph_mode not in self.graph_modes:
            raise ConfigError(
                f"graph_mode={config.graph_mode!r} is not for device={self.name}, which takes "
                f"{' and '.join(self.graph_modes)}"
            )

    @abstractmethod
    def worker_environment(self, config: EngineConfig, cores: int) -> dict[str, str]:
        """Environment variables that must be set before a worker process starts. `cores`: its share of its host's."""

    def host_environment(self, host: str) -> dict[str, str]:
        """The same, for workers of the host of that address where ranks are spread over several."""
        return {}

    @abstractmethod
    def open_device(self, device_index: int, config: EngineConfig) -> torch.device:
        """Claim the device for this process."""

    @abstractmethod
    def connect(self, rank: int, config: EngineConfig, store: Store | None) -> Communicator:
        """Join the process group over `store`; a world of one needs none."""

    @abstractmethod
    def layer_kernels(
        self, config: EngineConfig, model: ModelConfig, comm: Communicator, dtype: torch.dtype
    ) -> LayerKernels:
        """The operations of a layer for this rank of the model."""

    @abstractmethod
    def transfers(self, config: EngineConfig) -> Transfers:
        """How a step's numbers reach the opened device and come back."""

    def device_sampler(self, comm: Communicator, head: LMHead) -> DeviceSampler | None:
        """A sampler of plain draws that every rank runs, or None: then rank 0 samples with torch."""
        return None

    def fuse_layers(
        self, config: EngineConfig, model: DecoderLM, kernels: LayerKernels, comm: Communicator, dtype: torch.dtype
    ) -> FusedLayers | None:
        """What runs some steps of a loaded and finalized model, which has `kernels`, instead of its layers, or None.
        May change the model's weights."""
        return None

    def compile_kernels(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: DecoderLM,
        kernels: LayerKernels,
        sampler: DeviceSampler | None,
    ) -> Callable[[], None]:
        """Start whatever must be compiled for this model; returns what waits for it."""
        return lambda: None

    def recorder(
        self, config: EngineConfig, model: ModelConfig, kernels: LayerKernels, comm: Communicator
    ) -> Recorder | None:
        """What turns steps into device graphs as `config.graph_mode` says, or None where steps run by operation."""
        return None

    @abstractmethod
    def profile_tokens(self, config: EngineConfig) -> int:
        """Tokens of the forward that is run before `cache_bytes` is asked."""

    @abstractmethod
    def cache_bytes(self, config: EngineConfig) -> int:
        """Bytes that the KV cache of one rank may take, called after the profiling run."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all queued device work."""
