"""Ascend NPUs: HCCL between ranks, CANN's fused operators, steps as graphs, pinned transfers.

What an operator or a graph needs is in the files beside this one. Nothing here has run on a card yet: docs/ascend.md
says what was run in its place.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.workers.platform import npu_environment, npu_host, npu_limits
from nanovllm_dist.workers.platform.base import DeviceSampler, Finding, Platform

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from nanovllm_dist.models.config import ModelConfig
    from nanovllm_dist.models.layers.embedding import LMHead
    from nanovllm_dist.models.layers.kernels import LayerKernels
    from nanovllm_dist.models.parallel import Communicator
    from nanovllm_dist.workers.graphs import Recorder
    from nanovllm_dist.workers.transfers import Transfers


class NpuPlatform(Platform):
    """One NPU of this process: a card of 910B, a die of 910C."""

    name = "npu"
    ray_resource = "NPU"
    visible_devices_env = npu_host.VISIBLE
    default_dtype = "bfloat16"
    default_block_size = 128
    default_max_num_seqs = 256
    default_max_num_batched_tokens = 8192
    default_steps_in_flight = 2
    cache_layout = "rows"
    token_dtype = "int64"  # npu_scatter_nd_update_ takes no int32
    weight_formats = ("plain", "nz")
    graph_modes = ("auto", "eager", "torchair", "aclgraph")

    @staticmethod
    def is_present() -> bool:
        """Whether the driver shows this process an NPU and torch_npu is installed."""
        return importlib.util.find_spec("torch_npu") is not None and npu_host.count_devices() > 0

    @staticmethod
    def count_devices() -> int:
        """NPUs that the driver shows this process."""
        return npu_host.count_devices()

    def findings(self) -> list[Finding]:
        """Devices, driver, CANN, torch_npu, and whether they fit together."""
        from nanovllm_dist.workers.platform.npu_versions import findings

        return findings(npu_host.count_devices())

    def check(self, config: EngineConfig, model: ModelConfig) -> None:
        """Also whether the operators take what the config asks of them."""
        super().check(config, model)
        npu_limits.check(config, model)

    def worker_environment(self, config: EngineConfig, cores: int) -> dict[str, str]:
        """HCCL's, torch_npu's and OpenMP's."""
        return npu_environment.worker_environment(config)

    def host_environment(self, host: str) -> dict[str, str]:
        """The address by which HCCL reaches the other hosts, unless an interface was named."""
        return npu_environment.host_environment(host)

    def open_device(self, device_index: int, config: EngineConfig) -> torch.device:
        """Make the NPU current, on the cores near it. Raises ConfigError when there is none of that index."""
        import torch

        try:
            from torch_npu import npu
        except ImportError as error:
            raise ConfigError(
                f"device=npu: torch_npu cannot be imported: {error}; install the one of torch {torch.__version__}, and "
                "source set_env.sh of CANN before the launch (nanovllm-launch --doctor says what is missing)"
            ) from error
        count = npu.device_count()
        if device_index >= count:
            visible = os.environ.get(self.visible_devices_env, "all")
            raise ConfigError(
                f"NPU {device_index} was asked for and {count} are usable ({self.visible_devices_env}={visible}): "
                "lower tensor_parallel_size, or look at npu-smi info"
            )
        npu_host.bind_to_device(device_index)
        npu.set_device(device_index)
        npu.set_compile_mode(jit_compile=False)  # CANN's compiled operators, not one made for each shape
        return torch.device("npu", device_index)

    def connect(self, rank: int, config: EngineConfig, store: Store | None) -> Communicator:
        """Join an HCCL group."""
        from nanovllm_dist.models.parallel import SingleRank

        if store is None:
            return SingleRank()
        from nanovllm_dist.workers.platform.npu_hccl import open_communicator

        return open_communicator(rank, config.tensor_parallel_size, store)

    def layer_kernels(
        self, config: EngineConfig, model: ModelConfig, comm: Communicator, dtype: torch.dtype
    ) -> LayerKernels:
        """CANN's fused operators. Raises ConfigError for what they do not take."""
        from nanovllm_dist.workers.platform.npu_layers import NpuLayers

        return NpuLayers(config, model, comm, dtype)

    def device_sampler(self, comm: Communicator, head: LMHead) -> DeviceSampler:
        """Of operators that lower."""
        from nanovllm_dist.workers.platform.npu_sampler import NpuSampler

        return NpuSampler(comm, head)

    def transfers(self, config: EngineConfig) -> Transfers:
        """Through pinned memory."""
        from torch_npu import npu

        from nanovllm_dist.workers.platform.pinned_transfers import PinnedTransfers

        return PinnedTransfers(npu, self.name, config.max_steps_in_flight)

    def recorder(
        self, config: EngineConfig, model: ModelConfig, kernels: LayerKernels, comm: Communicator
    ) -> Recorder | None:
        """Graphs of the graph engine, captured ones, or none."""
        from nanovllm_dist.workers.platform.npu_graphs import recorder
        from nanovllm_dist.workers.platform.npu_layers import NpuLayers

        assert isinstance(kernels, NpuLayers)
        return recorder(config, model, kernels, comm)

    def profile_tokens(self, config: EngineConfig) -> int:
        """The whole budget: activations and cache share one memory."""
        return config.max_num_batched_tokens

    def cache_bytes(self, config: EngineConfig) -> int:
        """`kv_cache_memory`, or what `memory_utilization` leaves beside weights, graphs and the largest step."""
        from torch_npu import npu

        from nanovllm_dist.workers.platform.device_memory import cache_bytes

        return config.kv_cache_memory or cache_bytes(npu, config.memory_utilization)

    def synchronize(self) -> None:
        """Wait for the current device."""
        from torch_npu import npu

        npu.synchronize()
