"""NVIDIA GPUs: NCCL and symmetric memory between ranks, Triton kernels, CUDA graphs, pinned transfers."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
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

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_LARGEST_HEAD = 256


class CudaPlatform(Platform):
    """One GPU of this process."""

    name = "cuda"
    ray_resource = "GPU"
    visible_devices_env = "CUDA_VISIBLE_DEVICES"
    default_dtype = "bfloat16"
    default_block_size = 64
    default_max_num_seqs = 512
    default_max_num_batched_tokens = 8192
    default_steps_in_flight = 2
    cache_layout = "heads"

    @staticmethod
    def is_present() -> bool:
        """Whether the driver shows this process a GPU, and torch is built for it and has Triton beside it."""
        return _visible_gpus() > 0 and _torch_has_cuda() and importlib.util.find_spec("triton") is not None

    @staticmethod
    def count_devices() -> int:
        """GPUs that the driver shows this process."""
        return _visible_gpus()

    def findings(self) -> list[Finding]:
        """GPUs, and what torch lacks to use them."""
        gpus = _visible_gpus()
        if not gpus:
            return []
        lacks = [] if _torch_has_cuda() else ["torch is no CUDA build"]
        if importlib.util.find_spec("triton") is None:
            lacks.append("Triton is not installed")
        remark = f"not used: {' and '.join(lacks)}; pip install 'nanovllm_dist[cuda]'" if lacks else ""
        return [Finding("GPUs", str(gpus), remark)]

    def check(self, config: EngineConfig, model: ModelConfig) -> None:
        """Also whether the kernels take these sizes. Raises ConfigError."""
        super().check(config, model)
        if config.block_size not in _BLOCK_SIZES:
            raise ConfigError(f"block_size={config.block_size}: on this device it is one of {_BLOCK_SIZES}")
        if model.head_dim > _LARGEST_HEAD:
            raise ConfigError(
                f"head_dim={model.head_dim} of the model: kernels of this device take sizes up to {_LARGEST_HEAD}; "
                "device=cpu takes any"
            )

    def worker_environment(self, config: EngineConfig, cores: int) -> dict[str, str]:
        """One thread for torch's own CPU work; no multicast, which some hosts' switches do not survive."""
        threads = str(config.threads_per_worker or 1)
        nvls = os.environ.get("NCCL_NVLS_ENABLE", "0")
        return {"OMP_NUM_THREADS": threads, "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": nvls}

    def open_device(self, device_index: int, config: EngineConfig) -> torch.device:
        """Make the GPU current. Raises ConfigError when there is none of that index."""
        import torch

        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(
                f"torch {torch.__version__} finds no GPU: it needs a CUDA build, a driver as new as that, and a GPU in "
                "CUDA_VISIBLE_DEVICES; device=cpu runs without"
            )
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("device=cuda needs Triton, and it is not installed: pip install triton")
        if device_index >= count:
            visible = os.environ.get(self.visible_devices_env, "all")
            raise ConfigError(
                f"GPU {device_index} was asked for and {count} are usable (CUDA_VISIBLE_DEVICES={visible}): lower "
                "tensor_parallel_size, or look at nvidia-smi"
            )
        torch.cuda.set_device(device_index)
        return torch.device("cuda", device_index)

    def connect(self, rank: int, config: EngineConfig, store: Store | None) -> Communicator:
        """Join an NCCL group; sums go through symmetric memory where the host allows it."""
        from nanovllm_dist.models.parallel import SingleRank

        if store is None:
            return SingleRank()
        import torch
        import torch.distributed as dist

        from nanovllm_dist.workers.platform.symmetric_memory import open_communicator

        device = torch.device("cuda", torch.cuda.current_device())
        world_size = config.tensor_parallel_size
        dist.init_process_group(
            "nccl", store=store, rank=rank, world_size=world_size, timeout=patience(config), device_id=device
        )
        return open_communicator(device)

    def layer_kernels(
        self, config: EngineConfig, model: ModelConfig, comm: Communicator, dtype: torch.dtype
    ) -> LayerKernels:
        """Triton's."""
        from nanovllm_dist.workers.platform.cuda_layers import TritonLayers

        return TritonLayers(config, model, comm, dtype)

    def fuse_layers(
        self, config: EngineConfig, model: DecoderLM, kernels: LayerKernels, comm: Communicator, dtype: torch.dtype
    ) -> FusedLayers | None:
        """Layers whose norms have no kernels of their own, where that computes the same."""
        from nanovllm_dist.workers.platform.cuda_decoder import DeferredNorms, can_defer_norms, is_plain
        from nanovllm_dist.workers.platform.cuda_layers import TritonLayers
        from nanovllm_dist.workers.platform.cuda_sharded_decoder import JoinedNorms
        from nanovllm_dist.workers.platform.cuda_sum_norm import open_sum_norm

        assert isinstance(kernels, TritonLayers)
        if can_defer_norms(model, comm.world_size):
            return DeferredNorms(model, kernels)
        if comm.world_size == 1 or not is_plain(model):
            return None
        sums = open_sum_norm(comm, len(model.norm.weight), dtype, config.max_num_batched_tokens)
        return None if sums is None else JoinedNorms(model, kernels, sums)

    def transfers(self, config: EngineConfig) -> Transfers:
        """Through pinned memory."""
        import torch

        from nanovllm_dist.workers.platform.pinned_transfers import PinnedTransfers

        return PinnedTransfers(torch.cuda, self.name, config.max_steps_in_flight)

    def device_sampler(self, comm: Communicator, head: LMHead) -> DeviceSampler:
        """Each rank looks at its own range of the vocabulary."""
        from nanovllm_dist.workers.platform.cuda_sampler import ShardedSampler

        return ShardedSampler(comm, head)

    def compile_kernels(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: DecoderLM,
        kernels: LayerKernels,
        sampler: DeviceSampler | None,
    ) -> Callable[[], None]:
        """Triton's, in threads."""
        from nanovllm_dist.workers.platform.cuda_layers import TritonLayers
        from nanovllm_dist.workers.platform.cuda_sampler import ShardedSampler
        from nanovllm_dist.workers.platform.cuda_warm_up import compile_in_threads

        assert isinstance(sampler, ShardedSampler)
        assert isinstance(kernels, TritonLayers)
        return compile_in_threads(config, model_config, model, kernels, sampler)

    def recorder(
        self, config: EngineConfig, model: ModelConfig, kernels: LayerKernels, comm: Communicator
    ) -> Recorder | None:
        """CUDA graphs, unless eager steps are asked for."""
        from nanovllm_dist.workers.platform.cuda_graphs import CudaRecorder

        return None if config.graph_mode == "eager" else CudaRecorder()

    def profile_tokens(self, config: EngineConfig) -> int:
        """The whole budget: activations and cache share one memory."""
        return config.max_num_batched_tokens

    def cache_bytes(self, config: EngineConfig) -> int:
        """`kv_cache_memory`, or what `memory_utilization` leaves beside weights, graphs and the largest step."""
        import torch

        from nanovllm_dist.workers.platform.device_memory import cache_bytes

        return config.kv_cache_memory or cache_bytes(torch.cuda, config.memory_utilization)

    def synchronize(self) -> None:
        """Wait for the current device."""
        import torch

        torch.cuda.synchronize()


def _visible_gpus() -> int:
    """GPUs that the driver shows this process, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    return version.exists() and re.search(r"^cuda[^=]*=\s*['\"]", version.read_text(), re.MULTILINE) is not None
