"""An engine over two Ray nodes with a SIMULATED device each, declared as Ray resources: what several hosts need, but
for the network between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from npu_engine import Launched, environment, greedy_tokens

pytestmark = [pytest.mark.npu, pytest.mark.slow]


class Nodes:
    """A Ray cluster of two nodes on this machine; each sees one of the two devices."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "tmp").mkdir()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self.environment = {**token, "TMPDIR": str(directory / "tmp"), "RAY_USAGE_STATS_ENABLED": "0"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._start("0", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}/r")
        self._start("1", f"--address={self.address}", "--node-ip-address=127.0.0.2")

    def _start(self, device: str, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--num-cpus=1"]
        command += ['--resources={"NPU": 1}', f"--object-store-memory={80 * 2**20}"]
        limits = {"ASCEND_RT_VISIBLE_DEVICES": device, "PYTHONPATH": environment()["PYTHONPATH"]}
        given = {**os.environ, **self.environment, **limits}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=given)
        assert done.returncode == 0, done.stderr + done.stdout

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


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp", ignore_cleanup_errors=True) as directory:
        nodes = Nodes(Path(directory))
        yield nodes
        nodes.close()


def test_ranks_on_two_nodes_give_the_tokens_of_one_host(nodes: Nodes, smollm2: Path) -> None:
    tokens = {}
    for name, options in {
        "two nodes": {"launcher": "ray", "ray_address": nodes.address},
        "one host": {"launcher": "local"},
    }.items():
        engine = Launched(nodes.environment, model=smollm2, device="npu", tp=2, graph_mode="aclgraph", **options)
        try:
            ready = engine.address()
            tokens[name] = greedy_tokens(*ready)
        finally:
            engine.stop()
        assert ready[0].startswith("tcp://" if name == "two nodes" else "ipc://")
    assert tokens["two nodes"] == tokens["one host"]
