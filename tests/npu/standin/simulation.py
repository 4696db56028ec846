"""Makes a process's `npu` devices simulated ones: said aloud, and refused where no test asked for it."""

from __future__ import annotations

import os
import sys

from .environment import SIMULATION


def install() -> None:
    """Puts the simulated kernels in place. Needs torch_npu imported. Safe to repeat.

    Raises RuntimeError where NANOVLLM_NPU_SIMULATION is not set: nobody gets a simulation for an NPU unasked.
    """
    devices = os.environ.get(SIMULATION)
    if not devices:
        raise RuntimeError(f"the simulated NPU is for tests: it is refused where {SIMULATION} is not set")
    from . import kernels

    if int(devices) and kernels.install():
        sys.stderr.write(
            f"process {os.getpid()}: {devices} SIMULATED Ascend NPUs, on the CPU's memory and kernels: for tests only\n"
        )
