"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits where it must.

A kernel that takes part is launched with `launch_options` and does two things when DEPENDENT is set. It calls
`gdc_launch_dependents` first, so that the next kernel's programs may take the processors it leaves idle. And every
program calls `gdc_wait` before it writes anything, and before it reads anything but weights. The wait ends when the
kernel before has completed and its writes are visible. That kernel waited in the same way before it could complete,
so all earlier work is complete too: no buffer is read too early, and none, reused ones included, is written too
early. Kernels that do not take part wait for a whole kernel and are waited for as a whole: any order of both is safe.

Weights are read before the wait: nothing queued on the stream may still be writing them. Synchronise after loading.
"""

from __future__ import annotations

from functools import cache

import triton

# Off, every kernel starts after the one before has ended
ENABLED = True

_FIRST_ARCHITECTURE = 90


def launch_options() -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel that takes part, on the current device."""
    if ENABLED and _supported():
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@cache
def _supported() -> bool:
    if triton.knobs.runtime.interpret:
        return False
    architecture = triton.runtime.driver.active.get_current_target().arch
    # A number at one vendor, a name at others
    return isinstance(architecture, int) and architecture >= _FIRST_ARCHITECTURE
