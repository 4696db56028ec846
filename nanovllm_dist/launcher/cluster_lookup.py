"""What can be told of Ray without importing it: whether a cluster answers, its processes, what a private one has."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from nanovllm_dist.errors import EngineStartError

_REACH_SECONDS = 10.0
# of this program's engine on a private Ray: an engine beside it must leave them alone
devices_of_private_ray: list[str] = []


class RayTakenError(EngineStartError):
    """Another engine of this program has started a Ray for itself, and a program reaches one only."""


def check_reachable(address: str) -> None:
    """Raise OSError now where Ray itself would try for minutes. `auto` and the like are Ray's to look up."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()


def processes_of(temp_dir: Path) -> list[int]:
    """Pids of the Ray processes that use `temp_dir`, and of those that they started."""
    pids: list[int] = []
    for child in psutil.Process().children():
        try:
            if any(str(temp_dir) in argument for argument in child.cmdline()):
                pids += [child.pid, *(grandchild.pid for grandchild in child.children(recursive=True))]
        except psutil.Error:
            continue
    return pids
