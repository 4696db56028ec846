"""What differs between devices, as one interface; everything else in the engine is the same code.

A platform knows its device and nothing of requests, plans or models. Modules here import torch only inside
methods, so that the launcher can read defaults without paying for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

from nanovllm_dist.config import EngineConfig

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from nanovllm_dist.models.config import ModelConfig
    from nanovllm_dist.models.layers.decoder import DecoderLM
    from nanovllm_dist.models.layers.embedding import LMHead
    from nanovllm_dist.models.layers.kernels import LayerKernels
    from nanovllm_dist.models.parallel import Communicator
    from nanovllm_dist.workers.transfers import Transfers


class DeviceSampler(Protocol):
    """Argmax and plain temperature draws, without waiting for the device."""

    def sample(self, logits: torch.Tensor, inv_temperature: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """logits [N, columns] of this rank, float32 [N] inverse temperatures (0: greedy), float64 [N] uniforms in
        [0, 1) -> int64 [N], equal on all ranks. Every rank must call it."""
        ...


class Platform(ABC):
    """One kind of device."""

    name: ClassVar[str]
    distributed_backend: ClassVar[str]
    ray_resource: ClassVar[str]  # the Ray resource of which each rank reserves one unit
    visible_devices_env: ClassVar[str]  # the variable that limits a process to some devices; "" if there is none
    default_dtype: ClassVar[str]  # of a checkpoint whose config names none
    default_block_size: ClassVar[int]
    default_max_num_seqs: ClassVar[int]
    default_max_num_batched_tokens: ClassVar[int]
    default_steps_in_flight: ClassVar[int]
    cache_heads_first: ClassVar[bool] = False  # see kv_cache.allocate

    @staticmethod
    @abstractmethod
    def is_present() -> bool:
        """Whether such a device is on this machine, found out without importing torch."""

    @abstractmethod
    def worker_environment(self, config: EngineConfig) -> dict[str, str]:
        """Environment variables that must be set before a worker process starts."""

    @abstractmethod
    def open_device(self, device_index: int, config: EngineConfig) -> torch.device:
        """Claim the device for this process."""

    @abstractmethod
    def connect(self, rank: int, world_size: int, store: Store | None) -> Communicator:
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

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
        """Records what a function queues on the device, without running it, and returns what replays it."""
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
