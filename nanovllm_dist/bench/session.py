"""What every benchmark begins with: the config resolved and checked against the workload, and described for a report.

It starts no process; the engine that the config describes is the caller's to start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from nanovllm_dist.bench.roofline import Hardware, Limit, limit
from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.launcher.resolve import resolve_config
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.wire.messages import EngineInfo

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class EngineSummary(msgspec.Struct, frozen=True):
    """The engine that was measured; `options` are those that were set and not left to it."""

    model: str
    architecture: str
    device: str
    dtype: str
    tensor_parallel_size: int
    launcher: str
    max_num_seqs: int
    block_size: int
    num_blocks: int
    options: dict[str, Any]


class WorkloadSummary(msgspec.Struct, frozen=True):
    """The work in sums."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    temperature: float


@dataclass(frozen=True)
class Session:
    """A config as given, the same with nothing left open, and the model's shape."""

    given: EngineConfig
    resolved: EngineConfig
    model: ModelConfig

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return ITEMSIZE[self.resolved.dtype]

    @property
    def weight_itemsize(self) -> int:
        """Bytes of a weight."""
        return 1 if self.resolved.weight_format == "int8" else self.itemsize

    def limit(self, workload: Workload, hardware: Hardware, max_num_seqs: int) -> Limit:
        """What no engine of this config can pass on `hardware`, with `max_num_seqs` requests at once."""
        return limit(
            self.model,
            workload,
            hardware,
            tp=self.resolved.tensor_parallel_size,
            max_num_seqs=max_num_seqs,
            itemsize=self.itemsize,
            weight_itemsize=self.weight_itemsize,
        )

    def check(self, workload: Workload) -> None:
        """Raises ConfigError when a request of `workload` is longer than the engine takes."""
        if workload.longest > self.resolved.max_model_len:
            raise ConfigError(
                f"workload {workload.name} has a request of {workload.longest} tokens, and the model's limit here is "
                f"{self.resolved.max_model_len}: choose another workload, or raise --max-model-len"
            )

    def engine_summary(self, info: EngineInfo) -> EngineSummary:
        """The report's part on the engine that runs with this config."""
        defaults = msgspec.structs.asdict(EngineConfig(model="default"))
        options = {name: value for name, value in msgspec.structs.asdict(self.given).items() if value != defaults[name]}
        return EngineSummary(
            model=info.model,
            architecture=info.architecture,
            device=info.device,
            dtype=info.dtype,
            tensor_parallel_size=info.tensor_parallel_size,
            launcher=self.resolved.launcher,
            max_num_seqs=info.max_num_seqs,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            options=options,
        )


def open_session(config: EngineConfig, *workloads: Workload) -> Session:
    """Resolve `config`, fetching the model if need be, before any process starts.

    Raises ConfigError when a request of a workload is longer than the engine takes; else as `resolve_config`.
    """
    session = Session(config, *resolve_config(config))
    for workload in workloads:
        session.check(workload)
    return session


def workload_summary(workload: Workload, temperature: float) -> WorkloadSummary:
    """The report's part on the work."""
    return WorkloadSummary(
        workload.name, workload.num_requests, workload.prompt_tokens, workload.output_tokens, temperature
    )
