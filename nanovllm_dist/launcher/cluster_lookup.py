"""What can be told of Ray without importing it: whether a cluster answers, its processes here, whether one is ours."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import psutil

_REACH_SECONDS = 10.0
_private = threading.Event()


def has_private_ray() -> bool:
    """Whether an engine of this program has started a Ray for itself, which is then the only one it can reach."""
    return _private.is_set()


def note_private_ray(there: bool) -> None:
    """Say whether there is one now."""
    if there:
        _private.set()
    else:
        _private.clear()


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
