"""A whole engine's life on both launchers: it becomes ready or says why not, and whatever ends it leaves nothing.

A tiny model with random weights, real processes, real sockets, real signals.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.errors import ConfigError, EngineDeadError, EngineStartError, UnsupportedModelError
from nanovllm_dist.launcher.engine import Engine, Progress
from nanovllm_dist.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
    "eos_token_id": 2,
}
SMALL = {"load_format": "dummy", "max_model_len": 4096, "num_blocks": 300, "block_size": 16, "threads_per_worker": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
LAUNCHERS = ["local", "ray"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the config of a tiny model."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return str(directory)


@dataclass
class Sandbox:
    """A TMPDIR of its own, and a mark in the environment of whatever is started."""

    directory: Path
    mark: str
    shared_memory: set[str]

    def processes(self) -> list[psutil.Process]:
        """Living processes that carry the mark or use the directory, this one left out."""
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.environ().get("NANOVLLM_TEST_MARK") == self.mark:
                return True
            return any(os.readlink(f"/proc/{process.pid}/fd/{n}").startswith(str(self.directory)) for n in (1, 2))
        except (psutil.Error, OSError):
            return False

    def assert_empty(self, seconds: float = 15.0) -> None:
        """No process, no file and no shared memory is left after at most `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) or any(self.directory.iterdir()):
            assert time.monotonic() < deadline, (left, [str(path) for path in self.directory.rglob("*")][:20])
            time.sleep(0.1)
        assert set(os.listdir("/dev/shm")) <= self.shared_memory


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("NANOVLLM_TEST_MARK", mark)
        yield Sandbox(Path(directory), mark, set(os.listdir("/dev/shm")))


# --- ready, or the reason why not --------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_an_engine_of_two_ranks_serves_and_stops(model: str, sandbox: Sandbox, launcher: Any, transport: Any) -> None:
    seen: list[Progress] = []
    config = EngineConfig(model=model, launcher=launcher, transport=transport, tensor_parallel_size=2, **SMALL)
    engine = Engine.start(config, seen.append)
    try:
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
    finally:
        engine.stop()
    assert not engine.alive()
    assert engine.wait(timeout=1)
    engine.stop()
    sandbox.assert_empty()


def test_a_key_file_is_for_this_user_and_without_the_servers_secret(model: str, sandbox: Sandbox) -> None:
    engine = Engine.start(EngineConfig(model=model, launcher="local", transport="tcp", **SMALL))
    assert engine.key_file is not None
    content = json.loads(engine.key_file.read_text())
    mode = engine.key_file.stat().st_mode & 0o777
    engine.stop()
    assert mode == 0o600
    assert content.pop("server_secret") == ""
    assert all(content.values())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_that_fails_gives_its_typed_error_and_its_log(model: str, sandbox: Sandbox, launcher: Any) -> None:
    overrides = {"architectures": ["AbacusForCausalLM"]}
    started = time.monotonic()
    with pytest.raises(EngineStartError, match=r"worker-0: AbacusForCausalLM") as caught:
        Engine.start(EngineConfig(model=model, launcher=launcher, hf_overrides=overrides, **SMALL))
    assert isinstance(caught.value.__cause__, UnsupportedModelError)
    assert "Traceback" in str(caught.value)
    assert time.monotonic() - started < 60
    sandbox.assert_empty()


def test_a_port_that_is_taken_is_an_error_of_the_coordinator(model: str, sandbox: Sandbox) -> None:
    first = Engine.start(EngineConfig(model=model, launcher="local", transport="tcp", **SMALL))
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(EngineStartError, match=r"coordinator .*Address already in use"):
        Engine.start(EngineConfig(model=model, launcher="local", port=port, **SMALL))
    first.stop()
    sandbox.assert_empty()


def test_a_start_that_takes_too_long_says_so(model: str, sandbox: Sandbox) -> None:
    with pytest.raises(EngineStartError, match=r"startup_timeout=0\.5"):
        Engine.start(EngineConfig(model=model, launcher="local", startup_timeout=0.5, **SMALL))
    sandbox.assert_empty()


def test_a_contradiction_starts_no_process(model: str, sandbox: Sandbox) -> None:
    with pytest.raises(ConfigError):
        Engine.start(EngineConfig(model=model, tensor_parallel_size=64))
    assert sandbox.processes() == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("victim", ["worker-1", "coordinator"])
def test_a_process_that_dies_is_noticed_and_ends_its_requests(
    model: str, sandbox: Sandbox, launcher: Any, victim: str
) -> None:
    engine = Engine.start(EngineConfig(model=model, launcher=launcher, tensor_parallel_size=2, **SMALL))
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


# --- whatever ends the launcher ----------------------------------------------------------------------------


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


class Command:
    """A running `nanovllm-launch`."""

    def __init__(self, directory: Path, model: str, launcher: str, *arguments: str) -> None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        model_options = ["--model", model, "--launcher", launcher, "--tp=2"]
        self.out, self.err = directory / "stdout", directory / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm_dist.launcher.cli", *model_options, *options, *arguments],
                stdout=out,
                stderr=err,
            )

    def wait_for_output(self, text: str) -> None:
        """Wait until stdout or stderr has it."""
        wait_for(lambda: text in self.out.read_text() + self.err.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.err.read_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_serving_engine_prints_one_ready_line_and_ends_on_a_signal(
    model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, number: int
) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output("ready")
    assert len(sandbox.processes()) >= 5

    command.process.send_signal(number)

    assert command.process.wait(30) == 0
    assert re.fullmatch(r"ready ipc://\S+/client\n", command.out.read_text())
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("phase", ["looking for the model", "starting processes", "loading weights"])
def test_ctrl_c_while_it_starts(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, phase: str) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output(phase)

    command.process.send_signal(signal.SIGINT)

    assert command.process.wait(30) == 130
    assert "Traceback" not in command.err.read_text()
    sandbox.assert_empty()


def test_ctrl_c_while_ray_starts(model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    command = Command(tmp_path, model, "ray")
    command.wait_for_output("starting the cluster")

    command.process.send_signal(signal.SIGINT)

    assert command.process.wait(30) == 130
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_while_it_generates(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str) -> None:
    endless = {"prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True, "detokenize": False}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(endless) + "\n")
    command = Command(tmp_path, model, launcher, "--prompts-file", str(tmp_path / "prompts.jsonl"))
    command.wait_for_output("measuring memory")
    time.sleep(2.0)

    command.process.send_signal(signal.SIGTERM)

    assert command.process.wait(30) == 130, command.err.read_text()
    assert "Traceback" not in command.err.read_text()
    sandbox.assert_empty()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("when", ["starting processes", "ready"])
def test_sigkill_of_the_launcher(model: str, sandbox: Sandbox, tmp_path: Path, launcher: str, when: str) -> None:
    command = Command(tmp_path, model, launcher)
    command.wait_for_output(when)

    command.process.kill()
    command.process.wait()

    sandbox.assert_empty()


def test_prompts_are_answered_in_order_and_a_refused_one_is_named(model: str, sandbox: Sandbox, tmp_path: Path) -> None:
    lines = [{"prompt": [1], "id": "a"}, {"prompt": [9999], "id": "b"}, {"prompt": [2], "id": "c"}]
    for line in lines:
        line |= {"max_tokens": 3, "ignore_eos": True, "detokenize": False, "temperature": 0}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    command = Command(
        tmp_path, model, "local", "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")
    )

    assert command.process.wait(60) == 1
    assert "1 of 3 prompts failed, first prompt 1" in command.err.read_text()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", "b", "c"]
    assert [record.get("num_tokens") for record in records] == [3, None, 3]
    assert records[1]["error"]["code"] == "invalid_request"
    sandbox.assert_empty()
