"""Which environment variables give a process, and all that it starts, the stand-in for CANN.

They have to be set before the process starts: the loader reads its path once. Nothing inside the package knows of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from .build import library_directory

SIMULATION = "NANOVLLM_NPU_SIMULATION"
MEMORY = "NANOVLLM_NPU_SIMULATION_MEMORY"
_SITE = Path(__file__).parent / "site"


def environment(devices: int, memory_bytes: int | None = None) -> dict[str, str]:
    """Variables for a process that sees `devices` simulated NPUs; 0 is enough to lower graphs.

    `memory_bytes` is what each device has, 2 GiB if not given. Builds the libraries, if they are not there.
    """
    variables = {
        SIMULATION: str(devices),
        "LD_LIBRARY_PATH": _before(str(library_directory()), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _before(str(_SITE), "PYTHONPATH"),
        # torch must not import torch_npu by itself: processes that need no device would pay for it
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    if memory_bytes is not None:
        variables[MEMORY] = str(memory_bytes)
    return variables


def _before(entry: str, variable: str) -> str:
    others = [path for path in os.environ.get(variable, "").split(os.pathsep) if path and path != entry]
    return os.pathsep.join([entry, *others])
