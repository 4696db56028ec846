"""The CPU: shared memory or gloo between ranks, threads shared out, a stated share of free memory for the KV cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform.base import DeviceSampler, Finding, Platform, patience

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from nanovllm_dist.models.config import ModelConfig
    from nanovllm_dist.models.layers.decoder import DecoderLM, FusedLayers
    from nanovllm_dist.models.layers.embedding import LMHead
    from nanovllm_dist.models.layers.kernels import LayerKernels
    from nanovllm_dist.models.parallel import Communicator
    from nanovllm_dist.workers.graphs import Recorder
    from nanovllm_dist.workers.transfers import Transfers

# Without --kv-cache-memory all ranks together take this share of the memory that is free after loading, but no more
# than this many bytes, or than what the process with its weights takes if that is more: freed blocks are kept for
# prompts that begin alike, so a cache fills all the memory that it may, and a small model has no use for 6 GB
FREE_MEMORY_SHARE = 0.25
SMALL_CACHE_BYTES = 2**30
_WARM_UP_TOKENS = 16
# A step is hundreds of parallel regions a few microseconds apart. Threads that sleep between them cost a wake-up
# each time: 64 decodes of a 135M model on two cores took 297 ms asleep, 209 ms at 1,000 spins, 145 ms at this
_SPIN_COUNT = "1000000"


class CpuPlatform(Platform):
    """Runs everywhere; the reference for every other platform."""

    name = "cpu"
    ray_resource = "CPU"
    visible_devices_env = ""
    default_dtype = "float32"
    default_block_size = 32
    default_max_num_seqs = 64
    default_max_num_batched_tokens = 2048
    default_steps_in_flight = 1
    weight_formats = ("plain", "int8")

    @staticmethod
    def is_present() -> bool:
        """Always."""
        return True

    @staticmethod
    def count_devices() -> int:
        """Cores: what Ray counts as well."""
        return usable_cores()

    def findings(self) -> list[Finding]:
        """Cores, and memory that is free."""
        import psutil

        memory = psutil.virtual_memory()
        return [
            Finding("CPU", f"{usable_cores()} cores"),
            Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        ]

    def check(self, config: EngineConfig, model: ModelConfig) -> None:
        """Also whether the weight format goes with the dtype."""
        super().check(config, model)
        if config.weight_format == "int8" and config.dtype != "bfloat16":
            raise ConfigError(
                f"weight_format=int8 is for dtype=bfloat16, not {config.dtype}: set dtype=bfloat16 or leave it out"
            )

    def worker_environment(self, config: EngineConfig, cores: int) -> dict[str, str]:
        """Each rank's share of the cores, and how long its threads wait for each other awake."""
        threads = config.threads_per_worker or cores
        return {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", _SPIN_COUNT),
            # extensions of other devices, which need drivers that may be missing, are not loaded beside torch
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }

    def open_device(self, device_index: int, config: EngineConfig) -> torch.device:
        """The one CPU device."""
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")

    def connect(self, rank: int, config: EngineConfig, store: Store | None) -> Communicator:
        """Join a gloo group; ranks on one host share memory besides."""
        from nanovllm_dist.models.parallel import SingleRank

        if store is None:
            return SingleRank()
        import torch.distributed as dist

        from nanovllm_dist.workers.platform.cpu_group import open_group

        world_size = config.tensor_parallel_size
        timeout = patience(config)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        return open_group(store, timeout.total_seconds())

    def layer_kernels(
        self, config: EngineConfig, model: ModelConfig, comm: Communicator, dtype: torch.dtype
    ) -> LayerKernels:
        """C kernels for bfloat16 and for decodes where they can be built, torch for the rest."""
        from nanovllm_dist.workers.platform.cpu_attention import CpuAttention
        from nanovllm_dist.workers.platform.cpu_layers import cpu_layers

        return cpu_layers(CpuAttention(model.head_dim, dtype), dtype, config.weight_format == "int8")

    def fuse_layers(
        self, config: EngineConfig, model: DecoderLM, kernels: LayerKernels, comm: Communicator, dtype: torch.dtype
    ) -> FusedLayers | None:
        """The layers of a step by one C call, in bfloat16."""
        from nanovllm_dist.workers.platform.cpu_step import fuse_step

        return fuse_step(model, comm, dtype)

    def device_sampler(self, comm: Communicator, head: LMHead) -> DeviceSampler | None:
        """A C kernel for bfloat16 on one rank or the ranks of one host, which needs the logits in no other form."""
        from nanovllm_dist.workers.platform.cpu_sampler import cpu_sampler

        return cpu_sampler(comm, head)

    def recorder(
        self, config: EngineConfig, model: ModelConfig, kernels: LayerKernels, comm: Communicator
    ) -> Recorder | None:
        """Steps of decodes in one C call, for bfloat16."""
        from nanovllm_dist.workers.platform.cpu_recorder import cpu_recorder

        return None if config.graph_mode == "eager" else cpu_recorder(comm, kernels)

    def transfers(self, config: EngineConfig) -> Transfers:
        """There is nothing to transfer."""
        from nanovllm_dist.workers.transfers import DirectTransfers

        return DirectTransfers()

    def profile_tokens(self, config: EngineConfig) -> int:
        """A few: activations do not compete with the cache for a memory of their own, so it only warms up."""
        return min(_WARM_UP_TOKENS, config.max_num_batched_tokens)

    def cache_bytes(self, config: EngineConfig) -> int:
        """`kv_cache_memory` of each rank, or its part of a quarter of the free memory: at most 1 GiB of all ranks, or
        as much as the process has by now, whichever is more."""
        if config.kv_cache_memory:
            return config.kv_cache_memory
        import psutil

        ranks = config.tensor_parallel_size
        enough = max(SMALL_CACHE_BYTES // ranks, int(psutil.Process().memory_info().rss))
        return min(int(_available_memory() * FREE_MEMORY_SHARE) // ranks, enough)

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""


def usable_cores() -> int:
    """Cores of this host that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _available_memory() -> int:
    import psutil

    available = int(psutil.virtual_memory().available)
    if available < 2**26:
        raise ConfigError(f"only {available} bytes of memory are free: too little for a KV cache")
    return available
