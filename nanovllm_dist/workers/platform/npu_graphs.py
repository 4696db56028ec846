"""Which way of turning decodes into graphs an NPU takes, by the graph_mode option; the ways are in other files."""

from __future__ import annotations

from pathlib import Path

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import ModelConfig
from nanovllm_dist.models.parallel import Communicator
from nanovllm_dist.workers.graphs import Recorder
from nanovllm_dist.workers.platform.npu_layers import NpuLayers

# What `auto` is: a capture takes a second, where the graph engine may compile for minutes
_AUTO = "aclgraph"
_CACHE = "~/.cache/nanovllm_dist/graphs"


def recorder(config: EngineConfig, model: ModelConfig, layers: NpuLayers, comm: Communicator) -> Recorder | None:
    """The recorder of `config.graph_mode`, on the current device; None for eager steps."""
    mode = _AUTO if config.graph_mode == "auto" else config.graph_mode
    if mode == "aclgraph":
        from nanovllm_dist.workers.platform.npu_aclgraph import AclGraphRecorder

        return AclGraphRecorder(layers)
    if mode == "torchair":
        from nanovllm_dist.workers.platform.npu_torchair import TorchairRecorder

        return TorchairRecorder(config, model, layers, comm)
    return None


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Rows of decode graphs: powers of two and `max_num_seqs`. Few, for each costs streams of the device or a
    compilation; padding costs little, for a decode's time is that of reading weights and the keys of real rows."""
    sizes = [1]
    while 2 * sizes[-1] < max_num_seqs:
        sizes.append(2 * sizes[-1])
    return sizes if sizes[-1] == max_num_seqs else [*sizes, max_num_seqs]


def cache_root(config: EngineConfig) -> Path:
    """Where compiled graphs are kept. Raises ConfigError."""
    name = config.graph_cache_dir or _CACHE
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"graph_cache_dir={name!r}: {error} on this host: name a directory without ~") from None
