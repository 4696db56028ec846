"""A tiny model, a sandbox that sees what an engine leaves behind, and a running command line."""

from __future__ import annotations

import json
import os
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


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


class Command:
    """A running `nanovllm-launch`."""

    def __init__(
        self, directory: Path, model: str, launcher: str, *arguments: str, start_new_session: bool = False
    ) -> None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        model_options = ["--model", model, "--launcher", launcher, "--tp=2"]
        self.out, self.err = directory / "stdout", directory / "stderr"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nanovllm_dist.launcher.cli", *model_options, *options, *arguments],
                stdout=out,
                stderr=err,
                start_new_session=start_new_session,
            )

    def wait_for_output(self, text: str) -> None:
        """Wait until stdout or stderr has it."""
        wait_for(lambda: text in self.out.read_text() + self.err.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.err.read_text()
