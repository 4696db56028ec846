"""What the host knows of its NPUs: how many there are, and which cores are near each. It imports no torch.

On 910B a card is one device and on 910C each of its two dies is one; both have a device file and a number each.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import subprocess
from pathlib import Path

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_TOOL_SECONDS = 10.0
log = logging.getLogger(__name__)


def count_devices(root: Path = Path("/")) -> int:
    """NPUs that this process may use: those in ASCEND_RT_VISIBLE_DEVICES if it is set, else all of this host.

    Args:
        root: where the host's files are.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    files = [path for path in (root / "dev").glob("davinci*") if path.name.removeprefix("davinci").isdigit()]
    return len(files) or _count_by_runtime()


def _count_by_runtime() -> int:
    """For hosts whose device files have other names: what CANN's runtime says, where it can be loaded."""
    try:
        runtime = ctypes.CDLL("libascendcl.so")
    except OSError:
        return 0
    count = ctypes.c_uint32(0)
    return count.value if runtime.aclrtGetDeviceCount(ctypes.byref(count)) == 0 else 0


def bind_to_device(device_index: int) -> set[int]:
    """Keep this process on the cores near a device of those visible; returns them, none where nothing was done.

    That is the case where the topology is not known, the cores are not among those allowed, or CPU_AFFINITY_CONF asks
    torch_npu to do it its own way.
    """
    if "CPU_AFFINITY_CONF" in os.environ or not hasattr(os, "sched_setaffinity"):
        return set()
    near = _near_cores(_physical(device_index)) & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)
        log.info("bound to the %d cores near device %d", len(near), device_index)
    return near


def _physical(device_index: int) -> int:
    """The number of a device among all that npu-smi lists."""
    visible = [device.strip() for device in os.environ.get(VISIBLE, "").split(",")]
    if device_index < len(visible) and visible[device_index].isdigit():
        return int(visible[device_index])
    return device_index


def _near_cores(device: int) -> set[int]:
    try:
        answer = subprocess.run(
            ["npu-smi", "info", "-t", "topo"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return set()
    rows = parse_topology(answer.stdout)
    return rows[device] if device < len(rows) else set()


def parse_topology(text: str) -> list[set[int]]:
    """`npu-smi info -t topo` -> the cores near each device, in its order. Rows end in cores, such as `0-23,48-71`."""
    rows = re.findall(r"^\s*(?:NPU|Phy-ID)\s*\d+\s.*?\s(\d+(?:-\d+)?(?:,\s*\d+(?:-\d+)?)*)\s*$", text, re.MULTILINE)
    return [_cores(row) for row in rows]


def _cores(ranges: str) -> set[int]:
    cores: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
