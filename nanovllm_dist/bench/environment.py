"""What a measurement was made with: versions and the machine. It reads and measures nothing else."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from nanovllm_dist import __version__


class Environment(msgspec.Struct, frozen=True):
    """Versions ("" where a package is not installed), the CPU's name, and the cores this process may use.

    `load`: processes that wanted to run in the minute before. Above 0 others disturb the measurement.
    """

    nanovllm_dist: str
    python: str
    torch: str
    transformers: str
    system: str
    cpu: str
    cores: int
    load: float

    @property
    def busy(self) -> bool:
        """Whether other processes wanted more than half a core: figures, and ratios too, are then noise."""
        return self.load > 0.5


def describe_environment() -> Environment:
    """The environment of this process now. Imports neither torch nor transformers."""
    return Environment(
        nanovllm_dist=__version__,
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=usable_cores(),
        load=round(os.getloadavg()[0], 2),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return names[0] if names else platform.processor()
