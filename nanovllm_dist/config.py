"""EngineConfig: every option of an engine, frozen, validated once, passed explicitly to whoever needs it.

Zero (or an empty string) means "chosen for the device and the model"; `launcher.resolve` fills those in before
any process starts, but for what a worker finds out on its host. This module knows no device and no model.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec

from nanovllm_dist.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Policy = Literal["fcfs", "priority"]
LauncherKind = Literal["auto", "ray", "local"]
Hub = Literal["huggingface", "modelscope"]
Transport = Literal["auto", "ipc", "tcp"]
GraphMode = Literal["auto", "eager", "torchair", "aclgraph"]
WeightFormat = Literal["plain", "nz", "int8"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one engine. Raises ConfigError naming the field when a value is out of range.

    `startup_timeout` and `step_timeout` are seconds; the latter is how long one step may take, 0 for ever.
    `model_source` is no option: it keeps what `model` was before it was resolved to a directory of the launcher's host.
    """

    model: str
    model_source: str = ""
    served_model_name: str = ""
    tokenizer: str = ""
    device: str = "auto"
    dtype: Dtype = "auto"
    load_format: LoadFormat = "auto"
    hf_overrides: dict[str, Any] = {}
    tensor_parallel_size: int = 1
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    prefill_chunk_size: int = 0
    block_size: int = 0
    num_blocks: int = 0
    kv_cache_memory: int = 0
    memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    scheduling_policy: Policy = "fcfs"
    max_num_queued_reqs: int = 4096
    max_steps_in_flight: int = 0
    enforce_eager: bool = False
    graph_mode: GraphMode = "auto"
    graph_cache_dir: str = ""
    weight_format: WeightFormat = "plain"
    seed: int = 0
    threads_per_worker: int = 0
    startup_timeout: float = 600.0
    step_timeout: float = 600.0
    hub: Hub = "huggingface"
    launcher: LauncherKind = "auto"
    ray_address: str = ""
    transport: Transport = "auto"
    host: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        _require(bool(self.model), "model", self.model, "a name or a directory")
        _at_least_one(self, "tensor_parallel_size", "max_num_queued_reqs")
        _zero_or_more(
            self,
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk_size",
            "block_size",
            "num_blocks",
            "kv_cache_memory",
            "max_steps_in_flight",
            "threads_per_worker",
        )
        _at_most(self, 1024, "tensor_parallel_size", "threads_per_worker")
        _at_most(self, 65536, "max_num_seqs")
        _at_most(self, 2**31 - 1, "num_blocks")  # workers are told of blocks in 32 bits
        _require(0.0 < self.memory_utilization <= 1.0, "memory_utilization", self.memory_utilization, "in (0, 1]")
        _require(self.max_steps_in_flight <= 2, "max_steps_in_flight", self.max_steps_in_flight, "1 or 2")
        _require(0 <= self.port < 65536, "port", self.port, "between 0 and 65535")
        _require(0 < self.startup_timeout < math.inf, "startup_timeout", self.startup_timeout, "positive seconds")
        _require(0 <= self.step_timeout < math.inf, "step_timeout", self.step_timeout, "0 (none) or positive seconds")
        _require(self.max_model_len != 1, "max_model_len", 1, "0 (the model's) or at least 2: a prompt and an answer")
        least = self.least_blocks
        wanted = f"0 (automatic) or at least {least}: one is for padding, and the shortest request takes 2 tokens"
        if self.block_size == 1:
            wanted += ", with block_size=1 a block each"
        _require(not self.num_blocks or self.num_blocks >= least, "num_blocks", self.num_blocks, wanted)
        if self.num_blocks and self.kv_cache_memory:
            raise ConfigError("num_blocks and kv_cache_memory both size the KV cache: give one of them")
        if self.ray_address and self.launcher == "local":
            raise ConfigError("ray_address is set but launcher=local starts no Ray: drop one of them")
        if self.enforce_eager and self.graph_mode not in ("auto", "eager"):
            raise ConfigError(
                f"enforce_eager is set but graph_mode={self.graph_mode} asks for graphs: drop one of them"
            )
        if self.max_num_batched_tokens and self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} is above max_num_batched_tokens={self.max_num_batched_tokens}: "
                "each running request needs one token of the budget in every step"
            )

    def _check_types(self) -> None:
        try:
            msgspec.convert(msgspec.structs.asdict(self), _TypesOnly)
        except msgspec.ValidationError as error:
            raise ConfigError(f"engine options: {error}") from None
        try:  # every process of the engine is sent them
            msgspec.json.encode(self.hf_overrides)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"hf_overrides holds what JSON cannot: {error}") from None

    @property
    def least_blocks(self) -> int:
        """Blocks of the smallest cache that serves anything: one for padding, the others for one prompt token and one
        generated."""
        return 1 + -(-2 // (self.block_size or 2))

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with some fields changed, validated again."""
        return msgspec.structs.replace(self, **changes)

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """The config that a JSON object of options describes. Raises ConfigError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"engine options: {error}") from None


_TypesOnly = msgspec.defstruct(
    "_TypesOnly", [(field.name, field.type) for field in msgspec.structs.fields(EngineConfig)]
)

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(text: str) -> int:
    """`4GiB`, `512M`, `1073741824` -> bytes (units are powers of 1024). Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{text!r} is not a size in bytes: write for example 4GiB or 512M")
    return int(float(match[1]) * _UNITS[match[2]])


def _at_least_one(config: EngineConfig, *fields: str) -> None:
    for field in fields:
        _require(getattr(config, field) >= 1, field, getattr(config, field), "at least 1")


def _zero_or_more(config: EngineConfig, *fields: str) -> None:
    for field in fields:
        _require(getattr(config, field) >= 0, field, getattr(config, field), "0 (automatic) or positive")


def _at_most(config: EngineConfig, limit: int, *fields: str) -> None:
    for field in fields:
        _require(getattr(config, field) <= limit, field, getattr(config, field), f"at most {limit}")


def _require(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r} is not {wanted}")
