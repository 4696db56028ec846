"""The graph_mode option: what contradicts it, and which devices take which value. Free of torch_npu."""

from __future__ import annotations

from typing import Any

import pytest
from npu_rig import QWEN3_06B

from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError
from nanovllm_dist.models.config import parse_model_config
from nanovllm_dist.workers.platform import get_platform

MODEL = parse_model_config(QWEN3_06B)


def config(**options: Any) -> EngineConfig:
    limits = {"max_num_seqs": 8, "max_model_len": 512, "max_num_batched_tokens": 512, "block_size": 128}
    return EngineConfig(**{"model": "m", "dtype": "bfloat16", **limits, **options})


@pytest.mark.parametrize("mode", ["torchair", "aclgraph"])
def test_eager_steps_and_graphs_cannot_both_be_asked_for(mode: str) -> None:
    with pytest.raises(ConfigError, match=f"enforce_eager is set but graph_mode={mode}"):
        config(enforce_eager=True, graph_mode=mode)


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_eager_steps_may_be_asked_for_twice(mode: str) -> None:
    assert config(enforce_eager=True, graph_mode=mode).graph_mode == mode


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="graph_mode"):
        config(graph_mode="cuda")


@pytest.mark.parametrize("mode", ["auto", "eager", "torchair", "aclgraph"])
def test_an_npu_takes_every_mode(mode: str) -> None:
    get_platform("npu").check(config(graph_mode=mode), MODEL)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_devices_refuse_the_modes_of_an_npu(device: str) -> None:
    for mode in ("auto", "eager"):
        get_platform(device).check(config(graph_mode=mode), MODEL)
    with pytest.raises(ConfigError, match=rf"graph_mode='torchair' is not for device={device}.* auto and eager"):
        get_platform(device).check(config(graph_mode="torchair"), MODEL)
