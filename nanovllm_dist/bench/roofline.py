"""The limit of a workload on a device: no implementation can be faster than its memory and its matrix units.

Arithmetic over a model's shape, nothing measured. In decoding, all weights are read in each step and each running
request's keys and values too; prefill is arithmetic; an all-reduce costs its latency twice per layer and step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from nanovllm_dist.bench.workloads import Workload
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig


@dataclass(frozen=True)
class Hardware:
    """One device: bytes/s of memory, FLOP/s of matrices, and seconds of latency of one all-reduce.

    Raises ConfigError: a rate is not positive.
    """

    bandwidth: float
    flops: float
    all_reduce: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.flops <= 0 or self.all_reduce < 0:
            raise ConfigError("--bandwidth and --flops must be positive, and --all-reduce-us not negative")


class Limit(msgspec.Struct, frozen=True):
    """The least seconds a workload takes, by part, and the output tokens/s they allow; the same for one request.

    `weight_bytes`, `cache_bytes`: what one device reads of either over the whole of the decoding.
    """

    prefill: float
    decode: float
    all_reduce: float
    output_tokens_per_second: float
    one_request_tokens_per_second: float
    weight_bytes: float
    cache_bytes: float


class Achieved(msgspec.Struct, frozen=True):
    """What a run made of the limit: its share, and bytes/s of keys and values that one device read.

    `cache_bandwidth` is the mean over the whole run; `attention_bandwidth` that over the time left when all else takes
    no more than its least: what the attention of a fast engine comes to (None where no time is left).
    """

    share: float
    cache_bandwidth: float
    attention_bandwidth: float | None


def limit(
    model: ModelConfig,
    workload: Workload,
    hardware: Hardware,
    *,
    tp: int = 1,
    max_num_seqs: int = 0,
    itemsize: int = 2,
    weight_itemsize: int = 0,
) -> Limit:
    """The limit of `workload` over `tp` devices.

    `itemsize`: bytes of a number in the cache, and `weight_itemsize` of a weight (0: the same); `max_num_seqs`:
    requests that run at once (0: all of them).
    """
    weight_itemsize = weight_itemsize or itemsize
    body, head = _parameters(model)
    steps = max(workload.output_lens)
    if max_num_seqs:
        steps = max(steps, math.ceil(workload.output_tokens / max_num_seqs))
    weight_seconds = weight_itemsize * (body + head) / tp / hardware.bandwidth
    reduce_seconds = 2 * model.num_layers * hardware.all_reduce if tp > 1 else 0.0
    weight_bytes = steps * weight_itemsize * (body + head) / tp
    cache_bytes = _cache_bytes(model, workload, itemsize) / tp
    read = (weight_bytes + cache_bytes) / hardware.bandwidth
    decode = max(read, _decode_flops(model, workload, body, head) / tp / hardware.flops)
    prefill = _prefill_flops(model, workload, body, head) / tp / hardware.flops
    all_reduce = steps * reduce_seconds
    return Limit(
        prefill=prefill,
        decode=decode,
        all_reduce=all_reduce,
        output_tokens_per_second=workload.output_tokens / (prefill + decode + all_reduce),
        one_request_tokens_per_second=1 / (weight_seconds + reduce_seconds),
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
    )


def achieved(bound: Limit, hardware: Hardware, seconds: float) -> Achieved:
    """What a run of `seconds` made of `bound`, which is the limit of its workload on `hardware`."""
    rest = bound.prefill + bound.all_reduce + bound.weight_bytes / hardware.bandwidth
    return Achieved(
        share=(bound.prefill + bound.decode + bound.all_reduce) / seconds,
        cache_bandwidth=bound.cache_bytes / seconds,
        attention_bandwidth=bound.cache_bytes / (seconds - rest) if seconds > rest else None,
    )


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Weights of all layers, and of the output head; norms, biases and the embedding look-up are nothing beside."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)
    return layer * model.num_layers, model.hidden_size * model.vocab_size


def _attended(prompt: int, output: int) -> int:
    """Positions read over all decode steps of a request; its first token comes from the prefill."""
    return prompt * (output - 1) + output * (output - 1) // 2


def _cache_bytes(model: ModelConfig, workload: Workload, itemsize: int) -> int:
    per_position = 2 * itemsize * model.num_layers * model.num_kv_heads * model.head_dim
    return per_position * sum(map(_attended, workload.prompt_lens, workload.output_lens))


def _decode_flops(model: ModelConfig, workload: Workload, body: int, head: int) -> int:
    tokens = workload.output_tokens - workload.num_requests
    attention = 4 * model.num_layers * model.num_heads * model.head_dim
    return 2 * (body + head) * tokens + attention * sum(map(_attended, workload.prompt_lens, workload.output_lens))


def _prefill_flops(model: ModelConfig, workload: Workload, body: int, head: int) -> int:
    """Causal attention looks at half of the square; the head runs for the last position of each prompt."""
    attention = 2 * model.num_layers * model.num_heads * model.head_dim
    squares = sum(length * length for length in workload.prompt_lens)
    return 2 * body * workload.prompt_tokens + attention * squares + 2 * head * workload.num_requests
