"""A whole engine's life on both launchers: it becomes ready or says why not, and a process that dies is noticed.

A tiny model with random weights, real processes and real sockets.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_sandbox import LAUNCHERS, SMALL, Sandbox, model, sandbox, wait_for

from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, EngineDeadError, EngineStartError, WeightsError
from nanovllm_dist.launcher.engine import Engine, Progress
from nanovllm_dist.sampling_params import SamplingParams

__all__ = ["model", "sandbox"]  # fixtures
pytestmark = pytest.mark.slow

Start = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


@pytest.fixture
def start(sandbox: Sandbox) -> Iterator[Start]:
    """`Engine.start`, with a stop in any case."""
    engines: list[Engine] = []

    def start(*arguments: Any) -> Engine:
        engines.append(Engine.start(*arguments))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_an_engine_of_two_ranks_serves_and_stops(
    start: Start, model: str, sandbox: Sandbox, launcher: Any, transport: Any
) -> None:
    seen: list[Progress] = []
    config = EngineConfig(model=model, launcher=launcher, transport=transport, tensor_parallel_size=2, **SMALL)
    engine = start(config, seen.append)
    assert engine.info.tensor_parallel_size == 2
    assert set(engine.pids) == {"coordinator", "worker-0", "worker-1"}
    assert engine.address.startswith(transport)
    assert (engine.key_file is not None) == (transport == "tcp")
    assert engine.alive()
    assert not engine.wait(timeout=0.01)
    assert {"resolve", "start", "load", "ready"} <= {progress.phase for progress in seen}
    client = DistLLM.connect(engine.address, engine.key_file)
    assert len(client.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].token_ids) == 8
    client.close()
    engine.stop()
    assert not engine.alive()
    assert engine.wait(timeout=1)
    engine.stop()
    sandbox.assert_empty()


def test_a_key_file_is_for_this_user_and_without_the_servers_secret(start: Start, model: str, sandbox: Sandbox) -> None:
    engine = start(EngineConfig(model=model, launcher="local", transport="tcp", **SMALL))
    assert engine.key_file is not None
    content = json.loads(engine.key_file.read_text())
    mode = engine.key_file.stat().st_mode & 0o777
    engine.stop()
    assert mode == 0o600
    assert content.pop("server_secret") == ""
    assert all(content.values())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_that_fails_gives_its_typed_error_and_its_log(
    start: Start, model: str, sandbox: Sandbox, launcher: Any
) -> None:
    started = time.monotonic()
    with pytest.raises(EngineStartError, match=r"worker-0: .*safetensors") as caught:
        start(EngineConfig(model=model, launcher=launcher, **{**SMALL, "load_format": "auto"}))
    assert isinstance(caught.value.__cause__, WeightsError)
    assert "Traceback" in str(caught.value)
    assert time.monotonic() - started < 60
    sandbox.assert_empty()


def test_a_port_that_is_taken_is_an_error_of_the_coordinator(start: Start, model: str, sandbox: Sandbox) -> None:
    first = start(EngineConfig(model=model, launcher="local", transport="tcp", **SMALL))
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(EngineStartError, match=r"coordinator .*Address already in use"):
        start(EngineConfig(model=model, launcher="local", port=port, **SMALL))
    first.stop()
    sandbox.assert_empty()


def test_a_start_that_takes_too_long_says_so(start: Start, model: str, sandbox: Sandbox) -> None:
    with pytest.raises(EngineStartError, match=r"startup_timeout=0\.5"):
        start(EngineConfig(model=model, launcher="local", startup_timeout=0.5, **SMALL))
    sandbox.assert_empty()


def test_a_contradiction_starts_no_process(start: Start, model: str, sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError):
        start(EngineConfig(model=model, tensor_parallel_size=64))
    assert sandbox.processes() == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("victim", ["worker-1", "coordinator"])
def test_a_process_that_dies_is_noticed_and_ends_its_requests(
    start: Start, model: str, sandbox: Sandbox, launcher: Any, victim: str
) -> None:
    engine = start(EngineConfig(model=model, launcher=launcher, tensor_parallel_size=2, **SMALL))
    told: list[Exception] = []
    engine.on_death(told.append)

    os.kill(engine.pids[victim], signal.SIGKILL)

    with pytest.raises(EngineDeadError, match=r"coordinator|worker-1"):
        engine.wait(timeout=30)
    assert not engine.alive()
    wait_for(lambda: told)
    late: list[Exception] = []
    engine.on_death(late.append)
    assert late == told
    engine.stop()
    sandbox.assert_empty()


def test_an_engine_that_is_forgotten_is_stopped(model: str, sandbox: Sandbox) -> None:
    engine = Engine.start(EngineConfig(model=model, launcher="local", **SMALL))
    del engine
    sandbox.assert_empty()
