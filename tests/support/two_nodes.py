"""Two Ray nodes on this machine, under loopback addresses of their own: what differs from two hosts is the network and
the file systems, not the way that ranks, addresses and keys take."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

SECOND_ADDRESS = "127.0.0.2"


class TwoNodes:
    """A cluster of two nodes with one CPU each, and a token of its own.

    `options` go to both commands that start a node, `environments` to the first and to the second.

    Attributes:
        address: of the cluster.
        environment: what a process needs, beside its own, to join it.
    """

    def __init__(
        self, directory: Path, options: Sequence[str], environments: tuple[Mapping[str, str], Mapping[str, str]]
    ) -> None:
        self._directory = directory
        (directory / "tmp").mkdir()
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(directory / "tmp"),
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={directory}/r"]
        second = [f"--address={self.address}", f"--node-ip-address={SECOND_ADDRESS}"]
        for node, environment in zip((head, second), environments, strict=True):
            self._start([*node, *options], environment)

    def _start(self, options: list[str], environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        command += ["--num-cpus=1", f"--object-store-memory={80 * 2**20}"]
        given = {**os.environ, **self.environment, **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=given)
        assert done.returncode == 0, done.stderr + done.stdout

    def close(self) -> None:
        """Kill every process of the cluster."""
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


@contextmanager
def two_nodes(
    options: Sequence[str] = (), environments: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
) -> Iterator[TwoNodes]:
    """A cluster as long as the block runs; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="nv", dir="/tmp", ignore_cleanup_errors=True) as directory:
        nodes = TwoNodes(Path(directory), options, environments)
        try:
            yield nodes
        finally:
            nodes.close()
