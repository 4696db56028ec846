"""An engine over two Ray nodes. Both are on this machine, under loopback addresses of their own: what differs from two
hosts is the network and the file systems, not the way that ranks, addresses and keys take."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm_dist.config import EngineConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from nanovllm_dist.client import DistLLM
from nanovllm_dist.config import EngineConfig
from nanovllm_dist.launcher.engine import Engine
from nanovllm_dist.sampling_params import SamplingParams
engine = Engine.start(EngineConfig.from_json(sys.argv[1]))
llm = DistLLM.connect(engine.address, key_file=engine.key_file)
params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
tokens = [list(output.token_ids) for output in llm.generate([[1, 2, 3], [4, 5]], params, use_tqdm=False)]
llm.close(); engine.stop()
print(json.dumps({"address": engine.address, "tokens": tokens}))
"""
SECOND_ADDRESS = "127.0.0.2"


class Nodes:
    """A Ray cluster of two nodes with one CPU each, with a token of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "tmp").mkdir()
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(directory / "tmp"),
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._start("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}/r")
        self._start(f"--address={self.address}", f"--node-ip-address={SECOND_ADDRESS}")

    def _start(self, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += ["--num-cpus=1", f"--object-store-memory={80 * 2**20}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment)
        assert done.returncode == 0, done.stderr + done.stdout

    def run(self, config: EngineConfig, directory: Path | None = None) -> tuple[dict[str, Any], str]:
        """(what PROGRAM printed, its stderr) for an engine on this cluster."""
        joined = config.replace(ray_address=self.address)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, joined.to_json()],
            capture_output=True,
            text=True,
            timeout=180,
            env={**self.environment, "PYTHONPATH": str(ROOT)},
            cwd=directory,
        )
        return json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr

    def close(self) -> None:
        found = [process for process in psutil.process_iter() if self._is_of_it(process)]
        agents = [
            child for process in found for child in process.children(recursive=True)
        ]  # found by their parents alone
        for process in {*found, *agents}:
            if process.is_running():
                process.kill()

    def _is_of_it(self, process: psutil.Process) -> bool:
        """Ray's processes are nobody's children; they have the directory on their command line, or log to it."""
        try:
            logs = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (1, 2)]
            return any(str(self._directory) in text for text in (*process.cmdline(), *logs))
        except (psutil.Error, OSError):
            return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp", ignore_cleanup_errors=True) as directory:
        nodes = Nodes(Path(directory))
        yield nodes
        nodes.close()


def config(model: str, **options: Any) -> EngineConfig:
    return EngineConfig(model=model, load_format="dummy", num_blocks=50, threads_per_worker=1, device="cpu", **options)


def test_ranks_on_two_nodes_give_the_tokens_of_one_rank(nodes: Nodes, tiny_model: Path) -> None:
    both, errors = nodes.run(config(str(tiny_model), tensor_parallel_size=2))
    assert both, errors
    one, errors = nodes.run(config(str(tiny_model)))
    assert one, errors

    assert both["address"].startswith("tcp://")  # over the network, hence with keys
    assert both["tokens"] == one["tokens"]


def test_a_model_named_by_a_relative_path_is_found_by_every_process(nodes: Nodes, tiny_model: Path) -> None:
    answer, errors = nodes.run(config(tiny_model.name, tensor_parallel_size=2), directory=tiny_model.parent)
    assert answer, errors


def test_a_cluster_that_declares_no_such_device_says_how_to(nodes: Nodes, tiny_model: Path) -> None:
    _, errors = nodes.run(config(str(tiny_model), startup_timeout=3.0).replace(device="npu", dtype="bfloat16"))
    assert "the Ray cluster has 0 NPU (0 free), and 1 x 1 NPU was asked for" in errors
    assert "ray start --resources='{\"NPU\": N}'" in errors


def test_a_host_that_has_the_model_nowhere_is_named(tmp_path: Path) -> None:
    from nanovllm_dist.errors import ModelNotFoundError
    from nanovllm_dist.launcher.ray_cluster import ProcessHost

    host = ProcessHost(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert host.find_model(str(tmp_path), "my-model", "huggingface", True).directory == str(tmp_path)
    with pytest.raises(ModelNotFoundError, match="my-model"):
        host.find_model("/no/such/directory", "my-model", "huggingface", True)
