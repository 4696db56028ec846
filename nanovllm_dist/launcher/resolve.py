"""Fill in every option that was left to the device or the model, and refuse contradictions, before a process starts.

It reads JSON files of the checkpoint and imports no torch. It does not start anything.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

from nanovllm_dist.config import Dtype, EngineConfig
from nanovllm_dist.errors import ConfigError, UnsupportedModelError
from nanovllm_dist.models.config import ModelConfig, read_model_config
from nanovllm_dist.models.partition import split_heads
from nanovllm_dist.workers.platform import get_platform
from nanovllm_dist.workers.platform.base import Platform

_ALL_INTERFACES = ("*", "0.0.0.0", "::", "[::]")


def resolve_config(config: EngineConfig, progress: bool = True) -> tuple[EngineConfig, ModelConfig]:
    """A config with automatic values filled in, and the typed form of its model's configs.

    `model` becomes a directory (fetched if need be, with a progress display if `progress`), and the name as given
    goes to `model_source`, and to `served_model_name` unless that was set. What only a worker can measure
    (`num_blocks`, `kv_cache_memory`) or decide for its host (`threads_per_worker`, `graph_cache_dir`) stays empty.

    Raises:
        ConfigError: two options contradict each other, or one contradicts the model or the device.
        ModelNotFoundError, UnsupportedModelError: as `resolve_model` and `read_model_config` say.
    """
    _check_network(config)
    platform = get_platform(config.device)
    launcher = launcher_kind(config)
    directory = _model_directory(config, progress)
    model = read_model_config(directory, config.hf_overrides)
    for rank in range(config.tensor_parallel_size):
        split_heads(model.num_heads, model.num_kv_heads, config.tensor_parallel_size, rank)
    resolved = config.replace(
        model=str(directory),
        model_source=config.model_source or config.model,
        served_model_name=config.served_model_name or config.model,
        tokenizer=_tokenizer(config, directory, progress),
        device=platform.name,
        dtype=_dtype(config, model, platform),
        max_model_len=_model_length(config, model),
        block_size=config.block_size or platform.default_block_size,
        max_steps_in_flight=config.max_steps_in_flight or platform.default_steps_in_flight,
        launcher=launcher,
        graph_cache_dir=_graph_cache_dir(config.graph_cache_dir),
        **_batch_limits(config, platform),
    )
    platform.check(resolved, model)
    return resolved, model


def _model_directory(config: EngineConfig, progress: bool) -> Path:
    from nanovllm_dist.launcher.model_store import resolve_model

    # absolute: a process on a cluster starts in another directory
    return resolve_model(config.model, hub=config.hub, progress=progress).absolute()


def _tokenizer(config: EngineConfig, directory: Path, progress: bool) -> str:
    if not config.tokenizer or Path(config.tokenizer).is_dir():
        return str(Path(config.tokenizer).absolute() if config.tokenizer else directory)
    return str(_model_directory(config.replace(model=config.tokenizer), progress))


def launcher_kind(config: EngineConfig) -> str:
    """`ray` or `local`: Ray where its package is installed, unless the config names one. Raises ConfigError."""
    has_ray = importlib.util.find_spec("ray") is not None
    if config.launcher == "auto" and not config.ray_address:
        return "ray" if has_ray else "local"
    if config.launcher != "local" and not has_ray:
        raise ConfigError("launcher=ray needs the ray package: install nanovllm_dist[ray], or use launcher=local")
    return "ray" if config.launcher == "auto" else config.launcher


def _check_network(config: EngineConfig) -> None:
    if config.ray_address.startswith("ray://"):
        raise ConfigError(f"ray_address={config.ray_address!r} is Ray Client: run on a node and give its host:port")
    if config.transport == "ipc" and (config.host or config.port):
        raise ConfigError("host and port are for transport=tcp, and transport=ipc is set: drop one of them")
    if config.host in _ALL_INTERFACES:
        raise ConfigError(f"host={config.host!r} listens on every interface: give the one address to listen on")


def _graph_cache_dir(name: str) -> str:
    """Absolute, for workers may start in another directory; a home directory is each host's own, so `~` stays."""
    if not name.startswith("~"):
        return str(Path(name).absolute()) if name else ""
    try:
        Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"graph_cache_dir={name!r}: {error}: name a directory without ~") from None
    return name


def _dtype(config: EngineConfig, model: ModelConfig, platform: Platform) -> str:
    if config.dtype != "auto":
        return config.dtype
    dtype = model.dtype or platform.default_dtype
    supported = [name for name in get_args(Dtype) if name != "auto"]
    if dtype not in supported:
        raise UnsupportedModelError(f"config.json: dtype={dtype!r}: set the dtype option: {', '.join(supported)}")
    return dtype


def _model_length(config: EngineConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's max_position_embeddings={longest}: "
            "lower it, or extend the model with hf_overrides"
        )
    return config.max_model_len or longest


def _batch_limits(config: EngineConfig, platform: Platform) -> dict[str, int]:
    """A default gives way to a limit that was set: each running request needs a token of the budget."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if not tokens:
        tokens = max(platform.default_max_num_batched_tokens, seqs)
    if not seqs:
        seqs = min(platform.default_max_num_seqs, tokens)
    if config.prefill_chunk_size > tokens:
        raise ConfigError(
            f"prefill_chunk_size={config.prefill_chunk_size} is above max_num_batched_tokens={tokens}: "
            "a chunk cannot be larger than the step it runs in"
        )
    return {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": tokens,
        "prefill_chunk_size": config.prefill_chunk_size or tokens,
    }
